"""The bank of experts and the dense network against a loop over rows.

Shape legend: R rows, E experts, D width, H hidden.
"""

from typing import Any

import pytest
import reference as ref
import torch
from router_oracles import oracle_leaves, randomise
from torch import Tensor

from moesaic.model.dispatch import Dispatch
from moesaic.model.experts import ExpertOptions, Experts, FeedForward, FFNKind, FFNOptions
from moesaic.model.grouped import Group

torch.set_num_threads(1)

KINDS: list[FFNKind] = ["swiglu", "relu", "gelu", "relu2"]
D, H = 5, 6
COUNTS = [
    [3, 1, 4, 2],
    [0, 5, 0, 2],
    [0, 0, 7, 0],
    [6, 0, 0, 0],
    [0, 0, 0, 6],
    [1, 1, 1, 1],
    [3, 3, 3, 3],
    [0, 0, 0, 0],
]


def bank(kind: FFNKind, bias: bool, dtype: torch.dtype = torch.float64, count: int = 4) -> Experts:
    made = Experts(ExpertOptions(kind=kind, hidden=H, bias=bias, count=count), D)
    randomise(made, seed=4)
    return made.to(dtype)


def rows(number: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def sorted_rows(counts_E: list[int]) -> Dispatch:
    """One choice per token, the tokens already in the order of their experts."""
    order_R = torch.arange(sum(counts_E))
    return Dispatch(order_R, order_R, order_R[:, None], counts_E)


def through(made: Experts, x_RD: Tensor, counts_E: list[int]) -> Tensor:
    """What the bank makes of rows sorted by expert, all of weight one."""
    y_RD: Tensor = made(x_RD, x_RD.new_ones(len(x_RD), 1), sorted_rows(counts_E))
    return y_RD


def expert_of(p: dict[str, Tensor], kind: FFNKind, e: int) -> dict[str, Any]:
    """Expert ``e`` of a stacked bank as keywords of the oracle; the gate half comes first."""
    biases = {"down_bias": p["down_bias"][e]} if "down_bias" in p else {}
    if kind != "swiglu":
        biases |= {"up_bias": p["up_bias"][e]} if "up_bias" in p else {}
        return {"kind": kind, "up": p["up_proj"][e], "down": p["down_proj"][e], **biases}
    gate, up = p["gate_up_proj"][e].chunk(2)
    if "up_bias" in p:
        gate_bias, up_bias = p["up_bias"][e].chunk(2)
        biases |= {"gate_bias": gate_bias, "up_bias": up_bias}
    return {"kind": kind, "gate": gate, "up": up, "down": p["down_proj"][e], **biases}


def oracle(p: dict[str, Tensor], kind: FFNKind, x_RD: Tensor, counts_E: list[int]) -> Tensor:
    owner_R = [e for e, count in enumerate(counts_E) for _ in range(count)]
    outputs = [ref.expert_ffn(x, **expert_of(p, kind, e)) for x, e in zip(x_RD, owner_R, strict=True)]
    return torch.stack(outputs) if outputs else x_RD * 1


def compare(made: Experts, counts_E: list[int], tolerance: float) -> None:
    x = rows(sum(counts_E), made.down_proj.dtype).requires_grad_()
    exact, p = x.detach().double().requires_grad_(), oracle_leaves(made)
    y, expected = through(made, x, counts_E), oracle(p, made.kind, exact, counts_E)
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    torch.testing.assert_close(y, expected, **close)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.autograd.backward([(y * upstream).sum(), (expected * upstream).sum()])
    torch.testing.assert_close(x.grad, exact.grad, **close)
    for name, parameter in made.named_parameters():
        wanted = p[name].grad if p[name].grad is not None else torch.zeros_like(p[name])
        torch.testing.assert_close(parameter.grad, wanted, **close)


@pytest.mark.parametrize("counts_E", COUNTS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bank_equals_the_loop_in_values_and_gradients(kind: FFNKind, bias: bool, counts_E: list[int]) -> None:
    compare(bank(kind, bias), counts_E, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bank_of_float32_and_bank_of_one(kind: FFNKind) -> None:
    compare(bank(kind, True, torch.float32), [3, 0, 4, 2], 1e-5)
    compare(bank(kind, True, count=1), [5], 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bank_passes_gradcheck(kind: FFNKind, bias: bool) -> None:
    made, counts_E = bank(kind, bias), [2, 0, 1, 2]
    names = [name for name, _ in made.named_parameters()]

    def run(x: Tensor, weight_TK: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        given = (x, weight_TK, sorted_rows(counts_E))
        return torch.func.functional_call(made, weights, given)

    weight_TK = torch.rand(5, 1, dtype=torch.float64).requires_grad_()
    inputs = (rows(5).requires_grad_(), weight_TK, *made.parameters())
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("frozen", [("first",), ("down",), ("first", "down"), ("first", "down", "biases")])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_matrices_still_pass_the_gradient_on(kind: FFNKind, frozen: tuple[str, ...]) -> None:
    counts_E = [3, 0, 2, 1]
    free, held = bank(kind, True), bank(kind, True)
    parts = {"first": [held.first_matrix], "down": [held.down_proj], "biases": [held.up_bias, held.down_bias]}
    for part in frozen:
        for parameter in parts[part]:
            assert parameter is not None
            parameter.requires_grad_(False)
    grads = []
    for made in (free, held):
        x = rows(6).requires_grad_()
        torch.autograd.backward(through(made, x, counts_E).square().sum())
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    for (name, a), b in zip(free.named_parameters(), held.parameters(), strict=True):
        if b.requires_grad:
            assert torch.equal(a.grad, b.grad), name
        else:
            assert b.grad is None, name


def test_rows_that_need_no_gradient_still_train_the_bank() -> None:
    made = bank("swiglu", True)
    torch.autograd.backward(through(made, rows(6), [3, 0, 2, 1]).sum())
    assert made.gate_up_proj.grad is not None
    assert made.gate_up_proj.grad[1].abs().max() == 0
    assert made.gate_up_proj.grad[0].abs().max() > 0


def test_gradients_accumulate_over_calls() -> None:
    made = bank("swiglu", True)
    torch.autograd.backward(through(made, rows(6), [3, 0, 2, 1]).sum())
    once = [p.grad.clone() for p in made.parameters()]
    torch.autograd.backward(through(made, rows(6), [3, 0, 2, 1]).sum())
    for parameter, first in zip(made.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * first)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_works_in_bf16_and_leaves_float32_gradients(kind: FFNKind, bias: bool) -> None:
    counts_E = [3, 0, 4, 2]
    half, full = bank(kind, bias, torch.float32), bank(kind, bias, torch.float32)
    x = rows(9, torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = through(half, x, counts_E)
    assert y.dtype == torch.bfloat16
    expected = through(full, rows(9, torch.float32), counts_E)
    assert (y.float() - expected).norm() < 1e-2 * expected.norm()
    torch.autograd.backward([y.float().sum(), expected.sum()])
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() < 2e-2 * b.grad.norm()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("counts_E", "equal"),
    [
        ([0, 0, 0, 0], False),
        ([7, 9, 8, 8], False),
        ([47, 49, 48, 48], True),
        ([500, 520, 560, 480], True),
        ([2, 0, 0, 0], False),
        ([900, 100, 40, 1], False),
    ],
    ids=str,
)
def test_fillers_never_take_the_place_of_rows_nor_cost_much(
    counts_E: list[int], equal: bool, bf16: bool
) -> None:
    made = bank("swiglu", False, torch.bfloat16 if bf16 else torch.float32)
    filled_E = made.fill(counts_E, torch.device("cpu"))
    assert all(filled >= count for filled, count in zip(filled_E, counts_E, strict=True))
    assert sum(filled_E) <= max(2.6 * sum(counts_E), sum(counts_E) + 64 * 4)
    assert (len(set(filled_E)) == 1) is (equal or not any(counts_E))
    assert made.fill(counts_E, torch.device("meta")) == counts_E


def test_bf16_bank_without_autocast_takes_float32_rows() -> None:
    made = bank("relu", True, torch.bfloat16)
    assert through(made, rows(6, torch.float32), [3, 0, 2, 1]).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_network_equals_the_oracle_in_values_and_gradients(kind: FFNKind, bias: bool) -> None:
    made = FeedForward(FFNOptions(kind=kind, hidden=H, bias=bias), D)
    randomise(made, seed=6)
    made.double()
    p = oracle_leaves(made)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    keywords = {short: p[f"{long}.weight"] for short, long in names.items() if f"{long}.weight" in p}
    keywords |= {f"{short}_bias": p[f"{long}.bias"] for short, long in names.items() if f"{long}.bias" in p}
    x, exact = rows(4).requires_grad_(), rows(4).requires_grad_()
    y = made(x)
    expected = torch.stack([ref.expert_ffn(row, kind, **keywords) for row in exact])
    torch.testing.assert_close(y, expected)
    torch.autograd.backward([y.square().sum(), expected.square().sum()])
    torch.testing.assert_close(x.grad, exact.grad)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count_of_options_equals_the_modules(kind: FFNKind, bias: bool) -> None:
    options = ExpertOptions(kind=kind, hidden=H, bias=bias, count=4)
    assert options.parameters(D) == sum(p.numel() for p in FeedForward(options, D).parameters())
    assert 4 * options.parameters(D) == sum(p.numel() for p in Experts(options, D).parameters())


@pytest.mark.parametrize("counts_E", [[3, 1, 4, 2], [0, 5, 0, 2], [6, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_products_by_grouped_mm_are_those_of_the_loop(
    counts_E: list[int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of CUDA, through the loop that PyTorch has for it on CPU."""

    def run() -> list[Tensor]:
        made = Experts(ExpertOptions(kind="swiglu", hidden=16, bias=bias, count=4), 16)
        randomise(made, seed=4)
        x = torch.randn(sum(counts_E), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = through(made, x, counts_E)
        torch.autograd.backward(y.square().sum())
        return [y, x.grad, *(parameter.grad for parameter in made.parameters())]

    plain = run()
    calls = []
    grouped_mm = torch.nn.functional.grouped_mm

    def aligned(self: Group, rows: Tensor, stack: Tensor) -> bool:
        return all(size % 8 == 0 for size in (*stack.shape[1:], rows.shape[1]))

    monkeypatch.setattr(Group, "_grouped", aligned)
    monkeypatch.setattr(
        "moesaic.model.grouped.F.grouped_mm", lambda *a, **k: calls.append(1) or grouped_mm(*a, **k)
    )
    for ours, theirs in zip(run(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.detach().abs().max()))
    assert len(calls) == 6  # two products forward; two, and two of gradients, backward


@pytest.mark.parametrize("kind", KINDS)
def test_groups_of_few_experts_change_nothing(kind: FFNKind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.model.grouped._GROUP_BYTES", 200)
    compare(bank(kind, True), [3, 0, 4, 2], 1e-12)
    compare(bank(kind, False), [2, 2, 2, 2], 1e-12)


def test_large_float32_products_by_onednn_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.model.grouped._LARGE", 1)
    monkeypatch.setattr("moesaic.model.grouped.prefers_onednn", torch.backends.mkldnn.is_available)
    compare(bank("swiglu", False, torch.float32), [3, 0, 4, 2], 1e-5)
