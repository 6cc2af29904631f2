"""The routing value: counts, capacity, drops.

Shape legend: T tokens, E experts, K choices.
"""

import pytest
import reference as ref
import torch
from router_oracles import random_router, router_options
from torch import Tensor

from moesaic.analysis.routing import dropped_share
from moesaic.model.routers import ROUTERS, TokenChoiceOptions, within_capacity
from moesaic.routing import Routing

torch.set_num_threads(1)

TOKEN_CHOICE = [kind for kind, (options, _) in ROUTERS.items() if issubclass(options, TokenChoiceOptions)]


def random_choice(T: int, E: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, skewed towards the first ones, and which of them are wanted."""
    generator = torch.Generator().manual_seed(seed)
    liking_E = torch.arange(E, 0, -1) / 2
    expert_TK = (torch.randn(T, E, generator=generator) + liking_E).topk(K, dim=1).indices
    return expert_TK, torch.rand(T, K, generator=generator) < 0.8


def tokens(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(seed)) + 0.5


def routing_of(
    expert_TK: list[list[int]], keep: list[list[bool]], wanted: list[list[bool]], E: int, **more: Tensor
) -> Routing:
    T, K = len(expert_TK), len(expert_TK[0])
    return Routing(
        torch.ones(T, K),
        torch.tensor(expert_TK),
        torch.tensor(keep),
        torch.zeros(T, E),
        torch.full((T, E), 1 / E),
        torch.tensor(wanted),
        **more,
    )


def test_counts_and_dropped_share_by_hand() -> None:
    keep = [[True, False], [True, True], [False, False]]
    wanted = [[True, True], [True, True], [True, False]]
    routing = routing_of([[0, 1], [1, 3], [0, 2]], keep, wanted, 5)
    assert routing.num_experts == 5
    assert routing.counts_E().tolist() == [1, 1, 0, 1, 0]
    assert routing.counts_E(wanted=True).tolist() == [2, 2, 0, 1, 0]
    assert routing.counts_E().dtype == torch.int64
    assert dropped_share([routing]) == pytest.approx(2 / 5)
    assert routing.real_tokens() == 3


def test_nothing_wanted_means_nothing_dropped() -> None:
    routing = routing_of([[0, 1]], [[False, False]], [[False, False]], 2, real_T=torch.tensor([False]))
    assert dropped_share([routing]) == 0.0
    assert routing.real_tokens() == 0
    assert routing.counts_E().tolist() == [0, 0]


def test_detach_keeps_the_decision_and_drops_the_history() -> None:
    router = random_router(router_options("top_k", 2), 6, 4)
    routing = router(tokens(5), torch.tensor([True] * 4 + [False]))
    detached = routing.detach()
    for name in ("weight_TK", "expert_TK", "keep_TK", "logits_TE", "probs_TE", "wanted_TK", "real_T"):
        assert torch.equal(getattr(detached, name), getattr(routing, name))
        assert not getattr(detached, name).requires_grad
    assert routing.weight_TK.requires_grad


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
@pytest.mark.parametrize(("T", "E", "K"), [(13, 5, 3), (20, 4, 1), (6, 5, 5), (1, 3, 2)])
def test_capacity_in_arrival_order_equals_its_oracle(T: int, E: int, K: int, capacity: int) -> None:
    for seed in range(5):
        expert_TK, wanted_TK = random_choice(T, E, K, seed)
        keep_TK = within_capacity(expert_TK, wanted_TK, E, capacity)
        wanted = [
            [e for e, asked in zip(*row, strict=True) if asked]
            for row in zip(expert_TK.tolist(), wanted_TK.tolist(), strict=True)
        ]
        expected = iter([kept for row in ref.capacity_drop(wanted, E, capacity) for kept in row])
        rows = [[asked and next(expected) for asked in row] for row in wanted_TK.tolist()]
        assert keep_TK.tolist() == rows


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
def test_a_capacity_factor_limits_every_expert_and_drops_the_later_tokens(kind: str) -> None:
    T, E, K = 17, 5, 2
    router = random_router(router_options(kind, K, capacity_factor=0.8), 6, E).train()
    routing = router(tokens(T))
    limit = int(0.8 * T * K / E)
    wanted = [
        [e for e, asked in zip(*row, strict=True) if asked]
        for row in zip(routing.expert_TK.tolist(), routing.wanted_TK.tolist(), strict=True)
    ]
    kept = [k for row in ref.capacity_drop(wanted, E, limit) for k in row]
    assert routing.keep_TK[routing.wanted_TK].tolist() == kept
    assert not routing.keep_TK[~routing.wanted_TK].any()
    assert routing.counts_E().max() == limit
    assert dropped_share([routing]) == pytest.approx(1 - sum(kept) / len(kept))
    assert dropped_share([routing]) > 0


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
def test_evaluation_drops_nothing_unless_it_has_its_own_capacity(kind: str) -> None:
    x_TD = tokens(17)
    free = random_router(router_options(kind, 2, capacity_factor=0.2), 6, 5).eval()(x_TD)
    assert torch.equal(free.keep_TK, free.wanted_TK)
    assert dropped_share([free]) == 0
    tight = random_router(router_options(kind, 2, eval_capacity_factor=0.2), 6, 5)
    assert tight.eval()(x_TD).counts_E().max() == 1
    assert dropped_share([tight.train()(x_TD)]) == 0


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
def test_padding_takes_no_capacity(kind: str) -> None:
    real_T = torch.tensor([False, True, False] * 6)
    router = random_router(router_options(kind, 2, eval_capacity_factor=0.9), 6, 4).eval()
    x_TD = tokens(18)
    padded, alone = router(x_TD, real_T), router(x_TD[real_T])
    assert torch.equal(padded.keep_TK[real_T], alone.keep_TK)
    assert not padded.keep_TK[~real_T].any()
    assert dropped_share([padded]) == dropped_share([alone]) > 0
