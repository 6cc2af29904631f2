"""Banks out of a store against banks in memory: outputs, gradients, updates; whatever is in memory when."""

from pathlib import Path

import pytest
import torch
from disk_experts import CONSTANTS, D, E, H, L, disk, in_memory, options, routed
from tiny_runs import run_tiny, tiny
from torch import Tensor, nn

import moesaic
from moesaic.errors import RecipeError
from moesaic.model.experts import Experts, FFNKind
from moesaic.native import library
from moesaic.offload import adamw
from moesaic.offload.experts import DiskExperts
from moesaic.offload.factors import Factors, merged
from moesaic.offload.optimizer import SparseExpertAdamW
from moesaic.offload.records import ExpertShape, Matrices, MomentKind, WeightKind
from moesaic.offload.store import Index, StoreOptions
from moesaic.train.measure import dry_run

torch.set_num_threads(1)


def gradients_of(
    bank: nn.Module, x: Tensor, weight: Tensor, dispatch: object
) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = bank(x, weight, dispatch)
    (y * y.detach().cos()).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu", "relu2"])
@pytest.mark.parametrize("tokens", [1, 3, 50, 300])
def test_outputs_and_all_gradients_are_those_of_a_bank_in_memory(
    tmp_path: Path, kind: FFNKind, tokens: int
) -> None:
    given = options(kind)
    ours = disk(tmp_path / "store", given, slots=5)
    for layer in range(L):
        plain = in_memory(given, layer)
        x, weight, dispatch = routed(tokens, seed=layer)
        found = gradients_of(ours.banks[layer], x, weight, dispatch)
        expected = gradients_of(plain, x, weight, dispatch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        (taken,) = [part for where, part in ours.take_factors() if where == layer]
        dense = torch.cat([plain.first_matrix.grad.flatten(1), plain.down_proj.grad.flatten(1)], 1)
        found_rows = gradients_in(taken, given.layout.shape)
        assert torch.equal(found_rows, dense[taken.experts])
        assert taken.squared_norm() == pytest.approx(float(dense.square().sum()), rel=1e-4)
        assert ours.take_factors() == []


def test_gradients_of_two_batches_are_their_sum(tmp_path: Path) -> None:
    ours, shape = disk(tmp_path / "store"), options().layout.shape
    parts = []
    for seed in (1, 2, 3):
        x, weight, dispatch = routed(7, seed, among=3 * seed)
        gradients_of(ours.banks[0], x, weight, dispatch)
        parts += ours.banks[0].take_factors()
    total = torch.zeros(E, shape.parameters)
    for part in parts:
        total[part.experts] += gradients_in(part, shape)
    whole = merged(parts)
    assert whole.experts == sorted(whole.experts)
    torch.testing.assert_close(gradients_in(whole, shape), total[whole.experts])
    pieces = torch.cat([gradients_in(piece, shape) for piece in whole.chunks(2)])
    torch.testing.assert_close(pieces, total[whole.experts])
    assert isinstance(whole, Factors)


def train(ours: DiskExperts, steps: range, scale: float = 1.0) -> None:
    """Steps of batches in which some experts are hit and some are not."""
    for step in steps:
        for layer, bank in enumerate(ours.banks):
            x, weight, dispatch = routed(2, 100 * step + layer, top_k=1)
            gradients_of(bank, x, weight, dispatch)
        ours.update(ours.take_factors(), 3e-3 * min(1.0, step / 10), scale)


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_kernels_and_pytorch_agree(
    tmp_path: Path, weights: WeightKind, moments: MomentKind, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not library.available():
        pytest.skip("no compiler here")
    std = (0.2, 0.2) if weights == "fp32" else (0.02, 0.02)
    given, found = options(weights=weights, moments=moments, hidden=40, std=std), []
    for native in (True, False):
        monkeypatch.setattr(adamw.library, "available", lambda native=native: native)
        ours = disk(tmp_path / str(native), given, mode=mode)
        train(ours, range(1, 30), 0.7)
        found.append(weights_of(ours))
    moved = (found[1] - weights_of(disk(tmp_path / "begun", given))).norm()
    most = 1e-5 if moments == "fp32" else 0.03
    if weights == "bf16":  # rounded by different dice
        most = 0.12
    assert float((found[0] - found[1]).norm() / moved) < most


def weights_of(ours: DiskExperts) -> Tensor:
    each = [[rows_of(ours.gather(layer, [e], torch.float32)) for e in range(E)] for layer in range(L)]
    return torch.stack([torch.cat(layer) for layer in each])


def rows_of(matrices: Matrices) -> Tensor:
    """The parameters of each expert, [U, P]."""
    return torch.cat([part.flatten(1) for part in matrices], 1)


def gradients_in(factors: Factors, shape: ExpertShape) -> Tensor:
    made = shape.stacks(len(factors.experts), torch.float32)
    factors.write_gradients(made)
    return rows_of(made)


@pytest.mark.parametrize("mode", ["exact", "lazy"])
@pytest.mark.parametrize("tokens", [2, 60])
def test_training_is_that_of_a_bank_in_memory_bit_for_bit(tmp_path: Path, mode: str, tokens: int) -> None:
    """Float32 under the same optimizer, closed and opened again half-way."""
    given, c = options(), CONSTANTS
    ours = disk(tmp_path / "store", given, slots=5, mode=mode)
    plain = nn.ModuleList(in_memory(given, layer) for layer in range(L))
    optimizer = SparseExpertAdamW(
        plain.parameters(), betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, mode=mode
    )
    optimizer.watch(plain)
    for step in range(1, 41):
        rate = 3e-3 * min(1.0, step / 10)
        for layer, bank in enumerate(plain):
            x, weight, dispatch = routed(tokens, 100 * step + layer, top_k=1)
            found = gradients_of(ours.banks[layer], x, weight, dispatch)
            expected = gradients_of(bank, x, weight, dispatch)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        ours.update(ours.take_factors(), rate, 1.0)
        if step == 20:
            ours = opened_again(ours, tmp_path / "store", given, mode)
    optimizer.catch_up_all()
    assert torch.equal(weights_of(ours), torch.stack([_flat(bank) for bank in plain]))


def opened_again(ours: DiskExperts, folder: Path, given: StoreOptions, mode: str) -> DiskExperts:
    """After a checkpoint."""
    ours.pool.write_back()
    index, rates = Index.of(ours.store.index.tensors()), list(ours.history.rates)
    ours.close()
    again = disk(folder, given, slots=6, mode=mode)
    again.store.go_back(index, [])
    for rate in rates:
        again.history.add(rate)
    return again


def test_training_is_dense_adamw(tmp_path: Path) -> None:
    given = options()
    ours = disk(tmp_path / "store", given, slots=13)
    plain = [in_memory(given, layer) for layer in range(L)]
    begun = torch.stack([_flat(bank) for bank in plain])
    dense = torch.optim.AdamW(
        [p for bank in plain for p in bank.parameters()], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    for step in range(1, 81):
        for layer in range(L):
            x, weight, dispatch = routed(2, 100 * step + layer, top_k=1)
            gradients_of(ours.banks[layer], x, weight, dispatch)
            gradients_of(plain[layer], x, weight, dispatch)
        rate = 3e-3 * min(1.0, step / 10)
        dense.param_groups[0]["lr"] = rate
        for bank in plain:
            for p in bank.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad * 0.5
        dense.step()
        dense.zero_grad()
        ours.update(ours.take_factors(), rate, 0.5)
    expected = torch.stack([_flat(bank) for bank in plain])
    assert int((ours.store.index.stamp < 80).sum()) > 0
    moved = (expected - begun).norm()
    assert float((weights_of(ours) - expected).norm() / moved) < 2e-4


def _flat(bank: Experts) -> Tensor:
    return torch.cat([bank.first_matrix.flatten(1), bank.down_proj.flatten(1)], 1).detach().clone()


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_how_much_is_in_memory_changes_no_bit(
    tmp_path: Path, weights: WeightKind, moments: MomentKind, mode: str
) -> None:
    given = options(weights=weights, moments=moments)
    found = []
    for slots in (4, 100):
        ours = disk(tmp_path / str(slots), given, slots, mode=mode)
        train(ours, range(1, 20))
        weights_of(ours)  # looking changes nothing
        train(ours, range(20, 30))
        found.append((weights_of(ours), ours.store.index.stamp.copy()))
        assert (ours.pool.writes > 0) == (slots == 4)
        ours.store.close()
    assert torch.equal(found[0][0], found[1][0])
    assert (found[0][1] == found[1][1]).all()


@pytest.mark.parametrize("mode", ["exact", "lazy"])
def test_reopened_it_goes_on_bit_for_bit(tmp_path: Path, mode: str) -> None:
    whole = disk(tmp_path / "whole", slots=5, mode=mode)
    train(whole, range(1, 31))
    ours = disk(tmp_path / "parts", slots=5, mode=mode)
    train(ours, range(1, 16))
    ours.pool.write_back()
    index, rates = Index.of(ours.store.index.tensors()), list(ours.history.rates)
    ours.store.committed([index])
    train(ours, range(16, 20))  # which is lost
    ours.store.close()
    again = disk(tmp_path / "parts", slots=6, mode=mode)
    again.store.go_back(index, [])
    for rate in rates:
        again.history.add(rate)
    train(again, range(16, 31))
    assert torch.equal(weights_of(again), weights_of(whole))


@pytest.mark.parametrize("moments", ["bf16", "int8"])
def test_rounded_moments_learn_as_exact_ones_do(tmp_path: Path, moments: MomentKind) -> None:
    """A bank learns to give what another gives; rounding costs little of that."""
    losses = {}
    for kind in ("fp32", moments):
        ours = disk(tmp_path / kind, options(moments=kind, weights="bf16" if kind != "fp32" else "fp32"))
        target = in_memory(options(seed=99), 0)
        for step in range(1, 121):
            x, weight, dispatch = routed(40, step)
            y = ours.banks[0](x, weight.requires_grad_(), dispatch)
            loss = (y - target(x, weight, dispatch).detach()).square().mean()
            loss.backward()
            ours.update(ours.take_factors(), 1e-2, 1.0)
            losses[kind] = float(loss.detach())
            first = losses.setdefault(f"{kind} at first", losses[kind])
        assert losses[kind] < 0.7 * first
    gained = [losses[f"{kind} at first"] - losses[kind] for kind in (moments, "fp32")]
    assert gained[0] > 0.9 * gained[1], losses


def test_what_it_cannot_compute_is_said(tmp_path: Path) -> None:
    ours = disk(tmp_path / "store")
    x, weight, dispatch = routed(3, 1)
    with pytest.raises(RecipeError, match=r"without model\.dropout"):
        ours.banks[0](x, weight, dispatch, 0.1)
    with pytest.raises(RecipeError, match=r"offload\.memory: .* hold 1 experts of .*; give .* or more"):
        disk(tmp_path / "other", slots=1)
    small = disk(tmp_path / "third", slots=3)
    with pytest.raises(RecipeError, match=r"3 experts of .* fit, but .* needs 12 at once; give"):
        small.gather(0, list(range(E)), torch.float32)
    assert (CONSTANTS.beta1, D, H) == (0.9, 8, 6)


def test_a_run_on_disk_is_exported_measured_and_begun_from(tmp_path: Path) -> None:
    words = ["offload.memory=60kB", "model.attention.qk_norm=full", "optim.lr=1e-2"]
    run = run_tiny(tmp_path, "disk", *words)
    lm = moesaic.load(run)
    ids = torch.randint(0, 9, (1, 8), generator=torch.Generator().manual_seed(1))
    moesaic.export_model(run, tmp_path / "exported", dtype="float32")
    torch.testing.assert_close(moesaic.load(tmp_path / "exported").logits(ids), lm.logits(ids))
    after = run_tiny(tmp_path, "after", f"start={run}", "train.steps=1", "optim.lr=1e-12")
    torch.testing.assert_close(moesaic.load(after).logits(ids), lm.logits(ids))
    report = dry_run(tiny(tmp_path, *words, f"out={tmp_path / 'dry'}"), lambda sentence: None)
    assert report.numbers["parameters"] == lm.config.parameters().total
    assert not (tmp_path / "dry").exists()
    with pytest.raises(RecipeError, match="export it first"):
        run_tiny(tmp_path, "again", f"start={run}", *words)
    with pytest.raises(RecipeError, match="'12 apples' is no size"):
        tiny(tmp_path, "offload.memory=12 apples")
