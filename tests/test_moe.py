"""The sparse layer against the loop over tokens and experts, routed by each router's oracle.

Shape legend: T tokens, E experts, K choices, D width.
"""

from typing import Any

import pytest
import reference as ref
import torch
from router_oracles import ORACLES, draw, oracle_leaves, randomise, router_options
from test_experts import expert_of
from torch import Tensor

from moesaic.analysis.routing import dropped_share
from moesaic.model.dispatch import Fill, sort_by_expert
from moesaic.model.experts import ExpertOptions
from moesaic.model.moe import MoE
from moesaic.model.routers import ROUTERS, TokenChoiceOptions

torch.set_num_threads(1)

T, E, D = 11, 5, 6
CLOSE = {"rtol": 1e-5, "atol": 5e-6, "check_dtype": False}
LIMITED = [kind for kind, (options, _) in ROUTERS.items() if issubclass(options, TokenChoiceOptions)]


def tokens() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1))


def layer(router: Any, **experts: Any) -> MoE:
    options = {"kind": "swiglu", "hidden": 4, "count": E} | experts
    made = MoE(router, ExpertOptions(**options), D)
    randomise(made, seed=9)
    return made


def part(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in p.items() if name.startswith(prefix)}


def oracle(made: MoE, p: dict[str, Tensor], x_TD: Tensor, drawn: Tensor | None) -> Tensor:
    """The layer by its definition; capacity is taken from the options."""
    options, kind = made.gate.options, made.experts.kind
    weights = ORACLES[options.kind](options, part(p, "gate."), x_TD, drawn, made.training)["weights"]
    factor = getattr(options, "capacity_factor" if made.training else "eval_capacity_factor", None)
    if factor is not None:
        capacity = int(factor * len(x_TD) * options.top_k / E)
        keep = ref.capacity_drop([list(gates) for gates in weights], E, capacity)
        weights = [
            {e: w for (e, w), kept in zip(gates.items(), row, strict=True) if kept}
            for gates, row in zip(weights, keep, strict=True)
        ]
    experts = part(p, "experts.")
    y = ref.moe(x_TD, weights, [expert_of(experts, kind, e) for e in range(E)])
    shared = part(p, "shared_expert.")
    if shared:
        names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        keywords = {a: shared[f"{b}.weight"] for a, b in names.items() if f"{b}.weight" in shared}
        keywords |= {f"{a}_bias": shared[f"{b}.bias"] for a, b in names.items() if f"{b}.bias" in shared}
        extra = torch.stack([ref.expert_ffn(x, kind, **keywords) for x in x_TD])
        if "shared_expert_gate.weight" in p:
            extra = extra * torch.sigmoid(x_TD @ p["shared_expert_gate.weight"].T)
        y = y + extra
    return y


def compare(made: MoE, real_T: Tensor | None = None) -> None:
    x, exact, p = tokens().requires_grad_(), tokens().double().requires_grad_(), oracle_leaves(made)
    torch.manual_seed(3)
    y, _ = made(x, real_T)
    torch.manual_seed(3)
    real = slice(None) if real_T is None else real_T
    drawn = draw(made.gate.options, T, D, E, made.training)
    expected = oracle(made, p, exact[real], None if drawn is None else drawn[real])
    torch.testing.assert_close(y[real], expected, **CLOSE)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.autograd.backward([(y[real] * upstream).sum(), (expected * upstream).sum()])
    torch.testing.assert_close(x.grad, exact.grad, **CLOSE)
    for name, parameter in made.named_parameters():
        wanted, got = p[name].grad, parameter.grad
        if wanted is None:  # noise outside training: no gradient; an idle expert: none or zero
            assert got is None or got.abs().max() == 0, name
        else:
            torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_layer_equals_the_loop_for_every_router(kind: str, training: bool, top_k: int) -> None:
    compare(layer(router_options(kind, top_k, True)).train(training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LIMITED)
def test_layer_equals_the_loop_when_capacity_drops_choices(kind: str, training: bool) -> None:
    options = router_options(kind, 2, capacity_factor=0.7, eval_capacity_factor=0.5)
    made = layer(options).train(training)
    assert dropped_share([made(tokens())[1]]) > 0
    compare(made)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ROUTERS)
def test_layer_gives_padded_batches_what_the_real_tokens_get_alone(kind: str, training: bool) -> None:
    real_T = torch.tensor([False, False, True, True, False, True, True, True, True, True, False])
    made = layer(router_options(kind, 2)).train(training)
    compare(made, real_T)
    y, _ = made(tokens(), real_T)
    assert y[~real_T].abs().max() == 0


@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu", "relu2"])
@pytest.mark.parametrize(("shared_hidden", "shared_gate"), [(0, False), (3, False), (3, True)])
def test_layer_equals_the_loop_for_every_kind_of_expert_and_shared_expert(
    kind: str, shared_hidden: int, shared_gate: bool
) -> None:
    shared = {"shared_hidden": shared_hidden, "shared_gate": shared_gate}
    compare(layer(router_options("top_k", 2), kind=kind, bias=True, **shared))


@pytest.mark.parametrize("shared_hidden", [0, 3])
def test_a_token_without_any_expert_gets_zeros_or_the_shared_expert(shared_hidden: int) -> None:
    made = layer(router_options("top_k", 1, capacity_factor=0.5), shared_hidden=shared_hidden).train()
    x = tokens()
    y, routing = made(x)
    left_out_T = ~routing.keep_TK.any(1)
    assert left_out_T.any()
    if made.shared_expert is None:
        assert y[left_out_T].abs().max() == 0
    else:
        torch.testing.assert_close(y[left_out_T], made.shared_expert(x)[left_out_T])


def test_a_layer_that_drops_everything_still_has_gradients() -> None:
    made = layer(router_options("top_k", 1, capacity_factor=0.01)).train()
    x = tokens().requires_grad_()
    y, routing = made(x)
    assert routing.counts_E().sum() == 0
    torch.autograd.backward(y.sum())
    assert y.abs().max() == 0
    assert x.grad is not None
    assert x.grad.abs().max() == 0


def test_rows_are_sorted_by_expert_and_keep_arrival_order() -> None:
    made = layer(router_options("top_k", 3, capacity_factor=0.7)).train()
    _, routing = made(tokens())
    dispatch = sort_by_expert(routing)
    order_R, place_TK, counts_E = dispatch.order_R, dispatch.place_TK, dispatch.counts_E
    assert counts_E == routing.counts_E().tolist()
    assert len(order_R) == int(routing.keep_TK.sum())
    expert_R = routing.expert_TK.flatten()[order_R].tolist()
    assert expert_R == sorted(expert_R)
    for e in range(E):
        of_expert = [i for i, owner in zip(order_R.tolist(), expert_R, strict=True) if owner == e]
        assert of_expert == sorted(of_expert)
    assert torch.equal(place_TK[routing.keep_TK].sort().values, torch.arange(len(order_R)))
    assert (place_TK[~routing.keep_TK] == len(order_R)).all()
    assert torch.equal(place_TK.flatten()[order_R], torch.arange(len(order_R)))


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("unit", [1, 4, 64])
def test_filled_up_experts_change_no_output_and_no_gradient(
    unit: int, capacity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(fill: Fill) -> list[Tensor]:
        made = layer(router_options("top_k", 3, capacity_factor=capacity), bias=True).train()
        monkeypatch.setattr(made.experts, "fill", fill)
        x = tokens().requires_grad_()
        y, _ = made(x)
        torch.autograd.backward(y.square().sum())
        assert x.grad is not None
        return [y, x.grad, *(p.grad for p in made.parameters() if p.grad is not None)]

    plain = run(lambda counts_E, _: counts_E)
    to_unit = run(lambda counts_E, _: [-(-count // unit) * unit for count in counts_E])
    equal = run(lambda counts_E, _: [max(counts_E) + unit] * len(counts_E))
    for a, b, c in zip(plain, to_unit, equal, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_what_experts_return_in_training_only() -> None:
    options = ExpertOptions(kind="relu", hidden=4, count=E)
    made = MoE(router_options("top_k", 1), options, D, dropout=0.5)
    randomise(made, seed=9)
    x = tokens()
    quiet = made.eval()(x)[0]
    torch.testing.assert_close(made(x)[0], quiet)
    noisy = made.train()(x)[0]
    dropped = noisy == 0
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close(noisy[~dropped], 2 * quiet[~dropped])


@pytest.mark.parametrize("kind", ROUTERS)
def test_autocast_is_close_and_gives_float32_gradients(kind: str) -> None:
    made = layer(router_options(kind, 2), bias=True, shared_hidden=3, shared_gate=True).eval()
    x = tokens().requires_grad_()
    full, _ = made(tokens())
    with torch.autocast("cpu", torch.bfloat16):
        half, routing = made(x)
    assert routing.weight_TK.dtype == torch.float32
    assert (half.float() - full).norm() < 1e-2 * full.norm()
    torch.autograd.backward(half.float().sum())
    assert x.grad is not None
    trained = [p for name, p in made.named_parameters() if "noise" not in name]
    assert {p.grad.dtype for p in (x, *trained) if p.grad is not None} == {torch.float32}
    assert made.gate.weight.grad is not None
