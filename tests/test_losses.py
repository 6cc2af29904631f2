"""Losses against their oracles, and the truths that a balance loss has to tell.

Shape legend: N tokens, D width, V vocabulary, T tokens of one routing, E experts, K choices.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import reference_losses as ref_losses
import torch
from router_oracles import randomise, router_options
from torch import Tensor, nn

from moesaic.analysis.routing import dropped_share
from moesaic.losses import (
    IGNORE,
    BalanceConvention,
    ZConvention,
    balance_loss,
    convert_balance_weight,
    convert_z_weight,
    cross_entropy,
    entropy_bonus,
    token_losses,
    z_loss,
)
from moesaic.model.routers import TopK
from moesaic.routing import Routing

torch.set_num_threads(1)

BALANCE: list[BalanceConvention] = ["olmoe", "olmo_core", "transformers"]
Z: list[ZConvention] = ["olmoe", "plain"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def route(logits_TE: Tensor, k: int, real_T: Tensor | None = None, **options: Any) -> Routing:
    """The routing of a top-k router whose logits are given."""
    E = logits_TE.shape[1]
    router = TopK(router_options("top_k", k, **options), E, E)
    with torch.no_grad():
        router.weight.copy_(torch.eye(E))
    router.requires_grad_(False)
    return router(logits_TE, real_T)


def layer_of(logits_TE: Tensor, k: int, real_T: Tensor | None, score: str) -> ref_losses.Layer:
    probs = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    layer = ref_losses.Layer(probs=probs, logits=logits_TE, choices=probs.topk(k).indices.tolist())
    if real_T is not None:
        layer["real"] = real_T.tolist()
    return layer


LOSSES: dict[str, tuple[Callable[[list[Routing]], Tensor], Callable[[list[ref_losses.Layer]], Tensor]]] = {
    **{
        f"balance {c}": (lambda r, c=c: balance_loss(r, c), lambda q, c=c: ref_losses.balance_loss(q, c))
        for c in BALANCE
    },
    "z olmoe": (lambda r: z_loss(r, "olmoe"), lambda q: ref_losses.z_loss(q, "olmoe")),
    "z plain": (lambda r: z_loss(r, "plain"), lambda q: ref_losses.z_loss(q, "olmo_core")),
    "entropy": (entropy_bonus, ref_losses.entropy_bonus),
}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_equals_its_oracle_with_gradients(name: str, padded: bool, score: str) -> None:
    ours, theirs = LOSSES[name]
    leaves = [2 * tokens(7, 5, seed=s) for s in range(3)]
    masks = [torch.tensor([True] * n + [False] * (7 - n)) if padded else None for n in (5, 7, 2)]
    made = [x.clone().requires_grad_() for x in leaves]
    exact = [x.double().requires_grad_() for x in leaves]
    value = ours([route(x, 3, m, score=score) for x, m in zip(made, masks, strict=True)])
    expected = theirs([layer_of(x, 3, m, score) for x, m in zip(exact, masks, strict=True)])
    assert value.dtype == torch.float32
    assert value.shape == ()
    torch.testing.assert_close(value, expected, **CLOSE)
    torch.autograd.backward([value, expected])
    for x, y in zip(made, exact, strict=True):
        torch.testing.assert_close(x.grad, y.grad, **CLOSE)


# ---- what the balance loss must say -----------------------------------------------------------


def prefer(groups: list[list[int]], E: int = 8, T: int = 64) -> Tensor:
    """Logits where token t clearly prefers the experts of ``groups[t % len(groups)]``, equally."""
    logits_TE = torch.zeros(T, E)
    for t in range(T):
        logits_TE[t, groups[t % len(groups)]] = 30.0
    return logits_TE


def pairs(among: range) -> list[list[int]]:
    return [[e, e + 1] for e in among[::2]]


def test_balance_loss_ranks_health_and_sees_layers_that_collapse_apart() -> None:
    uniform = [route(prefer(pairs(range(8))), 2)] * 3
    half_dead = [route(prefer(pairs(range(4))), 2)] * 3
    together = [route(prefer([[2, 3]]), 2)] * 3
    apart = [route(prefer([[2 * i, 2 * i + 1]]), 2) for i in range(3)]
    for convention in ("olmoe", "olmo_core"):
        values = [balance_loss(r, convention).item() for r in (uniform, half_dead, together, apart)]
        assert values == pytest.approx([1.0, 2.0, 4.0, 4.0])  # E/k is the worst there is for k > 1


def test_the_pooled_convention_calls_layers_that_collapse_apart_balanced() -> None:
    uniform = [route(prefer(pairs(range(8))), 2)] * 4
    half_dead = [route(prefer(pairs(range(4))), 2)] * 4
    apart = [route(prefer([[2 * i, 2 * i + 1]]), 2) for i in range(4)]
    assert balance_loss(uniform, "transformers").item() == pytest.approx(2.0)
    assert balance_loss(apart, "transformers").item() == pytest.approx(2.0)
    assert balance_loss(apart, "olmoe").item() == pytest.approx(4.0)
    three = balance_loss(apart[:3], "transformers").item()
    assert three == pytest.approx(8 / 3)
    assert three < balance_loss(half_dead, "transformers").item() == pytest.approx(4.0)


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_balance_loss_is_one_when_perfectly_balanced(k: int) -> None:
    groups = [[(start + i) % 8 for i in range(k)] for start in range(8)]
    routing = route(prefer(groups), k)
    assert routing.counts_E().unique().numel() == 1
    assert balance_loss([routing]).item() == pytest.approx(1.0)
    assert balance_loss([routing], "transformers").item() == pytest.approx(k)


def test_one_step_on_the_balance_loss_alone_evens_out_the_router() -> None:
    router = TopK(router_options("top_k", 2), 6, 8)
    randomise(router, 1)
    x_TD = tokens(256, 6) + 0.8

    def imbalance() -> tuple[float, float]:
        routing = router(x_TD)
        p_E, load_E = routing.probs_TE.mean(0), routing.counts_E().float()
        return (p_E.max() / p_E.mean()).item(), (load_E.max() / load_E.mean()).item()

    before = imbalance()
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    loss = balance_loss([router(x_TD)])
    torch.autograd.backward(loss)
    assert router.weight.grad is not None
    assert router.weight.grad.abs().max() > 1e-3
    optimizer.step()
    after = imbalance()
    assert after[0] < before[0]
    assert after[1] < before[1]
    assert balance_loss([router(x_TD)]) < loss


def test_capacity_does_not_hide_an_imbalance_from_the_balance_loss() -> None:
    logits_TE = prefer([[2, 3]])
    free, tight = route(logits_TE, 2).detach(), route(logits_TE, 2, capacity_factor=1.0)
    assert dropped_share([tight]) > 0.5
    assert balance_loss([tight]) == balance_loss([free])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_stay_finite_when_a_router_is_certain(score: str) -> None:
    logits_TE = torch.tensor([[0.0, 200.0, -200.0], [1.0, 0.0, 0.5]], requires_grad=True)
    routing = route(logits_TE, 1, score=score)
    total = balance_loss([routing]) + z_loss([routing]) + entropy_bonus([routing])
    torch.autograd.backward(total)
    assert total.isfinite()
    assert logits_TE.grad is not None
    assert logits_TE.grad.isfinite().all()


@pytest.mark.parametrize("loss", [balance_loss, z_loss, entropy_bonus])
def test_a_routing_loss_without_sparse_layers_is_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one sparse layer"):
        loss([])


@pytest.mark.parametrize(("source", "target"), list(itertools.product(BALANCE, BALANCE)))
def test_converted_balance_weight_gives_the_same_term(
    source: BalanceConvention, target: BalanceConvention
) -> None:
    routing = route(tokens(9, 5), 3)
    weight = convert_balance_weight(0.01, source, target, 3)
    expected = 0.01 * balance_loss([routing], source)
    torch.testing.assert_close(weight * balance_loss([routing], target), expected)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(Z, Z)))
def test_converted_z_weight_gives_the_same_term(source: ZConvention, target: ZConvention) -> None:
    routings = [route(tokens(9, 5, seed=s), 3) for s in range(2)]
    weight = convert_z_weight(0.001, source, target, 3)
    torch.testing.assert_close(weight * z_loss(routings, target), 0.001 * z_loss(routings, source))


def test_olmoe_z_weight_is_an_eighth_of_the_plain_one_at_top_8() -> None:
    assert convert_z_weight(0.001, "olmoe", "plain", 8) == pytest.approx(0.000125)


# ---- cross-entropy ----------------------------------------------------------------------------


class SpyHead(nn.Module):
    """A head that remembers the size of everything it made."""

    def __init__(self, width: int, vocabulary: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, bias)
        randomise(self.linear, 3)
        self.sizes: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.linear(hidden)
        self.sizes.append(logits.numel())
        return logits


def targets(N: int, V: int) -> Tensor:
    target_N = torch.arange(N) * 7 % V
    target_N[[1, N - 1]] = IGNORE
    return target_N


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("max_logits", [22, 35, 2**24, 5])
def test_chunked_token_losses_equal_the_oracle_with_gradients(max_logits: int, bias: bool) -> None:
    N, D, V = 13, 4, 11
    head, hidden_ND, target_N = SpyHead(D, V, bias), tokens(N, D).requires_grad_(), targets(N, V)
    losses_N = token_losses(hidden_ND, head, target_N, max_logits=max_logits)
    exact = [t.detach().double().requires_grad_() for t in (hidden_ND, *head.linear.parameters())]
    parts = ref_losses.cross_entropy(exact[0], exact[1], exact[2] if bias else None, target_N.tolist())
    torch.testing.assert_close(losses_N, torch.stack(parts), **CLOSE)
    assert losses_N.dtype == torch.float32
    assert losses_N[1] == losses_N[N - 1] == 0
    weight_N = torch.arange(N) / 3
    torch.autograd.backward([(losses_N * weight_N).sum(), (torch.stack(parts) * weight_N).sum()])
    for ours, theirs in zip((hidden_ND, *head.linear.parameters()), exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **CLOSE)
    assert max(head.sizes) <= max(max_logits, V)  # one row is the least there can be


def test_what_fits_is_computed_once_and_what_does_not_twice() -> None:
    N, V = 12, 10
    for max_logits, expected in ((N * V, N * V), (N * V - 1, 2 * N * V)):
        head = SpyHead(4, V, True)
        hidden_ND = tokens(N, 4).requires_grad_()
        loss = token_losses(hidden_ND, head, targets(N, V), max_logits=max_logits).sum()
        torch.autograd.backward(loss)
        assert sum(head.sizes) == expected + V  # and one row to learn the vocabulary


@pytest.mark.parametrize("max_logits", [2**24, 22])
def test_mean_is_over_the_targets_that_count(max_logits: int) -> None:
    head, hidden_ND, target_N = SpyHead(4, 11, False), tokens(13, 4), targets(13, 11)
    mean = cross_entropy(hidden_ND, head, target_N, max_logits=max_logits)
    torch.testing.assert_close(mean, nn.functional.cross_entropy(head(hidden_ND), target_N))
    nothing = cross_entropy(hidden_ND, head, torch.full((13,), IGNORE), max_logits=max_logits)
    assert nothing == 0
    assert cross_entropy(hidden_ND[:0], head, target_N[:0], max_logits=max_logits) == 0


def test_losses_of_half_precision_logits_are_summed_in_float32() -> None:
    head = SpyHead(4, 11, False).bfloat16()
    hidden_ND, target_N = tokens(13, 4).bfloat16(), targets(13, 11)
    ours = token_losses(hidden_ND, head, target_N)
    expected = nn.functional.cross_entropy(head(hidden_ND).float(), target_N, reduction="none")
    assert torch.equal(ours, expected)
