"""Optimizers and schedules against hand-computed points, torch's AdamW and exact orthogonalisation.

Shape legend: E matrices of a stack.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_losses as ref
import torch
from tiny_runs import run_tiny, tiny
from torch import Tensor, nn

import moesaic
from moesaic.errors import RecipeError
from moesaic.model.transformer import LanguageModel
from moesaic.native import library
from moesaic.train.optim import (
    MasterAdamW,
    Muon,
    OptimOptions,
    ScheduleOptions,
    build_optimizers,
    clip,
    gradient_norm,
    half,
    load_optimizer_tensors,
    missing_state,
    optimizer_tensors,
    orthogonalise,
    schedule_factor,
    set_learning_rate,
    sign_polynomials,
)
from moesaic.train.rundir import read_rows

torch.set_num_threads(1)


def factor(step: int, steps: int = 100, **options: Any) -> float:
    return schedule_factor(ScheduleOptions(**options), step, steps)


@pytest.mark.parametrize(
    ("options", "step", "wanted"),
    [
        ({}, 1, 1.0),
        ({}, 100, 1.0),
        ({"warmup": 4}, 1, 0.25),
        ({"warmup": 4}, 4, 1.0),
        ({"warmup": 4}, 5, 1.0),
        ({"kind": "linear"}, 25, 0.75),
        ({"kind": "linear"}, 100, 0.0),
        ({"kind": "linear", "warmup": 20}, 10, 0.5),
        ({"kind": "linear", "warmup": 20}, 20, 1.0),
        ({"kind": "linear", "warmup": 20}, 60, 0.5),
        ({"kind": "linear", "final": 0.2}, 50, 0.6),
        ({"kind": "linear", "final": 0.2}, 100, 0.2),
        ({"kind": "cosine"}, 50, 0.5),
        ({"kind": "cosine"}, 100, 0.0),
        ({"kind": "cosine", "final": 0.1}, 100, 0.1),
        ({"kind": "cosine", "final": 0.1}, 25, 0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))),
        ({"kind": "wsd"}, 80, 1.0),
        ({"kind": "wsd"}, 90, 0.5),
        ({"kind": "wsd", "decay_fraction": 0.4}, 60, 1.0),
        ({"kind": "wsd", "decay_fraction": 0.4}, 70, 0.75),
        ({"kind": "wsd", "final": 0.5}, 100, 0.5),
        ({"kind": "wsd", "warmup": 95}, 95, 1.0),
        ({"kind": "linear", "warmup": 200}, 100, 0.5),
    ],
)
def test_schedules_pass_through_points_computed_by_hand(
    options: dict[str, Any], step: int, wanted: float
) -> None:
    assert factor(step, **options) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules_never_leave_zero_to_one(kind: str) -> None:
    for steps in (1, 2, 7):
        for warmup in (0, 1, 3, 10):
            for step in range(1, steps + 3):
                assert 0 <= factor(step, steps, kind=kind, warmup=warmup) <= 1


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (1, 6), (64, 16)])
def test_orthogonalise_comes_near_the_exact_one(shape: tuple[int, int]) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    slow = ref.muon_orthogonalise(g)
    for steps, error in ((5, 0.13), (7, 0.03)):
        ours = orthogonalise(g[None], steps)[0]
        assert ours.dtype == torch.float32
        assert (ours.double() - slow).norm() < error * slow.norm()
        assert (torch.linalg.svdvals(ours.double()) - 1).abs().max() < error + 0.02


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 12])
def test_each_polynomial_is_the_best_for_what_the_last_one_left(steps: int) -> None:
    x, error = np.geomspace(1e-3, 1, 100_001), 0.999
    for a, b, c in sign_polynomials(steps):
        x = a * x * 1.01 + b * (x * 1.01) ** 3 + c * (x * 1.01) ** 5  # without the margin for bf16
        misses = x - 1
        assert abs(misses).max() <= error
        if abs(misses).max() > 1e-2:  # Chebyshev: the largest miss is met four times, with alternating sign
            extreme = misses[np.abs(misses) > 0.999 * abs(misses).max()]
            order = np.sign(extreme)
            assert 1 + np.count_nonzero(np.diff(order)) >= 4
        error = abs(misses).max()
        x = np.geomspace(x.min(), x.max(), 100_001)
    if steps >= 5:
        assert error < 0.12
    if steps == 12:
        assert error < 1e-9


def test_the_direction_of_every_singular_vector_is_kept() -> None:
    u, _, v = torch.linalg.svd(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())
    g = (u * torch.tensor([3.0, 2.0, 1.5, 1.0, 0.8, 0.6])) @ v
    inside = u.T @ orthogonalise(g.float()[None], 7)[0].double() @ v.T
    assert (inside.diagonal() > 0.9).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 0.05


def test_a_zero_gradient_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def muon_step(shape: tuple[int, ...], grads: list[Tensor], start: Tensor, **options: Any) -> Tensor:
    parameter = nn.Parameter(start.clone())
    assert parameter.shape == shape
    muon = Muon([parameter], **{"lr": 0.1, **options})
    for grad in grads:
        parameter.grad = grad.clone()
        muon.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4)])
def test_a_stack_of_experts_is_each_expert_by_itself(shape: tuple[int, int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    start, *grads = (torch.randn(shape, generator=draw) for _ in range(4))
    stacked = muon_step(shape, grads, start, weight_decay=0.1)
    for e in range(shape[0]):
        alone = muon_step(shape[1:], [g[e] for g in grads], start[e], weight_decay=0.1)
        # bf16 sums in another order for a batch of another size
        torch.testing.assert_close(stacked[e], alone, atol=2e-3, rtol=2e-2)


def test_matrices_of_one_shape_do_not_mix() -> None:
    draw = torch.Generator().manual_seed(5)
    starts = [torch.randn(4, 6, generator=draw) for _ in range(3)]
    grads = [torch.randn(4, 6, generator=draw) for _ in range(3)]
    together = [nn.Parameter(s.clone()) for s in starts]
    for parameter, grad in zip(together, grads, strict=True):
        parameter.grad = grad.clone()
    Muon(together, lr=0.1).step()
    for parameter, start, grad in zip(together, starts, grads, strict=True):
        alone = muon_step((4, 6), [grad], start)
        torch.testing.assert_close(parameter.detach(), alone, atol=2e-3, rtol=2e-2)


def test_a_muon_update_by_hand() -> None:
    """Nesterov momentum, orthogonalised, scaled for tall matrices, after decoupled decay."""
    draw = torch.Generator().manual_seed(2)
    start, first, second = (torch.randn(8, 2, generator=draw) for _ in range(3))
    momentum, lr, decay = 0.9, 0.1, 0.5
    buffer, wanted = torch.zeros(8, 2), start.clone()
    for grad in (first, second):
        buffer = momentum * buffer + (1 - momentum) * grad
        direction = ref.muon_orthogonalise((1 - momentum) * grad + momentum * buffer).float()
        wanted = wanted * (1 - lr * decay) - lr * 2.0 * direction  # sqrt(8 / 2) = 2
    ours = muon_step((8, 2), [first, second], start, lr=lr, momentum=momentum, weight_decay=decay, ns_steps=7)
    torch.testing.assert_close(ours, wanted, atol=0.02, rtol=0.02)


def model(folder: Path, *words: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(tiny(folder, "model.vocab_size=11", *words).model)


def steps(made: LanguageModel, optimizers: list[torch.optim.Optimizer], seeds: range) -> None:
    for seed in seeds:
        ids_BT = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(seed))
        made(ids_BT).logits_BTV.square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "muon"])
def test_saved_state_continues_bit_for_bit(kind: str, tmp_path: Path) -> None:
    options = OptimOptions(kind=kind)  # type: ignore[arg-type]
    whole = model(tmp_path)
    optimizers = build_optimizers(whole, options)
    steps(whole, optimizers, range(3))
    state = {name: tensor.clone() for name, tensor in optimizer_tensors(whole, optimizers).items()}
    weights = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    steps(whole, optimizers, range(3, 6))
    later = model(tmp_path)
    later.load_state_dict(weights)
    again = build_optimizers(later, options)
    load_optimizer_tensors(later, again, state)
    steps(later, again, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name]), name
    for name, tensor in optimizer_tensors(whole, optimizers).items():
        assert torch.equal(tensor, optimizer_tensors(later, again)[name]), name


def test_state_of_a_parameter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    made = model(tmp_path)
    optimizers = build_optimizers(made, OptimOptions())
    with pytest.raises(KeyError):
        load_optimizer_tensors(made, optimizers, {"model.nothing.weight/exp_avg": torch.zeros(1)})


def test_adamw_is_torchs(tmp_path: Path) -> None:
    options = OptimOptions(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1, decay="all")
    ours, theirs = model(tmp_path), model(tmp_path)
    steps(ours, build_optimizers(ours, options), range(4))
    steps(theirs, [torch.optim.AdamW(theirs.parameters(), 0.01, (0.8, 0.9), 1e-6, 0.1)], range(4))
    for (name, one), two in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5, msg=name)


def decays(made: LanguageModel, options: OptimOptions) -> dict[str, tuple[str, float]]:
    """Name of each parameter to its optimizer and weight decay; a name may come up once only."""
    names = {parameter: name for name, parameter in made.named_parameters()}
    found: dict[str, tuple[str, float]] = {}
    for optimizer in build_optimizers(made, options):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found
                found[names[parameter]] = (type(optimizer).__name__, group["weight_decay"])
    return found


BIASED = [
    "model.experts.bias=true",
    "model.attention.out_bias=true",
    "model.router.bias=true",
    "model.conv=2",
    "model.norm=layer",
]


def test_only_matrices_decay_unless_all_shall(tmp_path: Path) -> None:
    made = model(tmp_path, *BIASED)
    by_name = dict(made.named_parameters())
    found = decays(made, OptimOptions(weight_decay=0.3))
    assert found.keys() == by_name.keys()
    for name, (_, decay) in found.items():
        matrix = by_name[name].ndim > 1 and not name.endswith(("up_bias", "down_bias", "conv.weight"))
        assert decay == (0.3 if matrix else 0.0), name
    everything = decays(made, OptimOptions(weight_decay=0.3, decay="all"))
    assert {decay for _, decay in everything.values()} == {0.3}


@pytest.mark.parametrize("tied", ["false", "true"])
def test_muon_takes_the_matrices_inside_blocks_alone(tied: str, tmp_path: Path) -> None:
    made = model(tmp_path, *BIASED, f"model.tied={tied}", "model.position=learned", "model.head_bias=true")
    found = decays(made, OptimOptions(kind="muon"))
    assert found.keys() == dict(made.named_parameters()).keys()
    taken = {name for name, (optimizer, _) in found.items() if optimizer == "Muon"}
    inside = {name.split(".", 3)[3] for name in taken}
    assert all(name.startswith("model.layers.") for name in taken)
    assert {"self_attn.o_proj.weight", "mlp.experts.down_proj"} <= inside
    for word in ("gate.weight", "norm", "bias", "embed", "head", "conv"):
        assert not any(word in name for name in taken), word
    kept = {name for name in found if name not in taken and found[name][0] == "AdamW"}
    assert {"model.embed_tokens.weight", "model.layers.0.mlp.gate.weight"} <= kept


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "muon"])
def test_frozen_parameters_are_in_no_optimizer(kind: str, tmp_path: Path) -> None:
    made = model(tmp_path)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("experts" in name)
    found = decays(made, OptimOptions(kind=kind))  # type: ignore[arg-type]
    assert found
    assert all("experts" in name for name in found)


def test_the_rate_is_the_base_times_the_factor(tmp_path: Path) -> None:
    optimizers = build_optimizers(model(tmp_path), OptimOptions(kind="muon", lr=0.004, matrix_lr=0.03))
    for value in (0.5, 0.25, 1.0):
        set_learning_rate(optimizers, value)
        rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert rates == {0.004 * value, 0.03 * value}


def _bf16_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 24), nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 9, bias=False)
    )


@pytest.mark.parametrize("native", [True, False])
def test_masters_follow_adamw_on_float32_weights(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the same gradients, the masters are what AdamW makes of float32 weights, and the weights are
    those rounded to the nearest."""
    if native and not library.available():
        pytest.skip("no compiler here")
    monkeypatch.setattr(library, "available", lambda: native)
    plain, rounded = _bf16_model(), _bf16_model()
    half(rounded)
    assert [p.dtype for p in rounded.parameters()].count(torch.bfloat16) == 3
    for p, q in zip(plain.parameters(), rounded.parameters(), strict=True):
        p.data.copy_(q.float())
    options = OptimOptions(kind="adamw", lr=3e-3, weight_decay=0.1)
    (adamw,), both = build_optimizers(plain, options), build_optimizers(rounded, options)
    assert {type(one) for one in both} == {torch.optim.AdamW, MasterAdamW}
    for step in range(20):
        torch.manual_seed(step)
        for p, q in zip(plain.parameters(), rounded.parameters(), strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        norm = gradient_norm([q.grad for q in rounded.parameters() if q.grad is not None])
        torch.testing.assert_close(
            norm, gradient_norm([p.grad for p in plain.parameters() if p.grad is not None])
        )
        assert clip([adamw], norm, 5.0) == clip(both, norm, 5.0) < 1
        for one in (adamw, *both):
            one.step()
    for p, q in zip(plain.parameters(), rounded.parameters(), strict=True):
        state = next((one.state[q] for one in both if q in one.state), {})
        torch.testing.assert_close(state.get("master", q), p.data, rtol=1e-5, atol=1e-6)
        assert torch.equal(q.float(), state["master"].bfloat16().float() if "master" in state else q.float())
    other = _bf16_model()  # on a machine that does not multiply bfloat16 the masters are the weights
    (continued,) = build_optimizers(other, options)
    other.load_state_dict(rounded.state_dict())
    load_optimizer_tensors(other, [continued], optimizer_tensors(rounded, both))
    for p, q in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.data, p.data, rtol=1e-5, atol=1e-6)
    assert missing_state(other, [continued]) is None


def test_a_run_with_rounded_weights_learns_resumes_and_is_evaluated(tmp_path: Path) -> None:
    words = ["train.precision=bf16", "train.clip=1.0", "train.steps=40", "optim.lr=1e-2"]
    whole = run_tiny(tmp_path, "whole", "train.weights=bf16", *words)
    part = run_tiny(tmp_path, "part", "train.weights=bf16", *words, "train.steps=17")
    run_tiny(tmp_path, "part", "train.weights=bf16", *words, resume=True)
    full = run_tiny(tmp_path, "full", *words)
    ends = {
        run.name: [r["loss"] for r in read_rows(run / "metrics.jsonl") if r["split"] == "val"][-1]
        for run in (whole, part, full)
    }
    assert ends["part"] == ends["whole"]
    assert ends["whole"] == pytest.approx(ends["full"], rel=0.02)
    models = [dict(moesaic.load(run).model.named_parameters()) for run in (whole, part)]
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.accumulate=2"], "too coarse to sum"),
        (["optim.kind=muon"], "optim.kind to adamw"),
    ],
)
def test_where_weights_cannot_be_rounded_it_is_said(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tiny(tmp_path, "train.weights=bf16", *words)
