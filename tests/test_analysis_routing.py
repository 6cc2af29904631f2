"""Load, specialisation and dominant experts on cases worked out by hand.

Shape legend: L sparse layers, T tokens, E experts, K choices, C domains.
"""

import math

import pytest
import torch

from moesaic.analysis.routing import (
    counts_per_layer,
    dominant_experts,
    dropped_share,
    mutual_information,
    specialisation,
    summarise_load,
    token_weights,
)
from moesaic.routing import Routing


def routing(
    experts: list[list[int]],
    weights: list[list[float]],
    E: int,
    keep: list[list[bool]] | None = None,
    wanted: list[list[bool]] | None = None,
) -> Routing:
    expert_TK = torch.tensor(experts)
    all_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    keep_TK = all_TK if keep is None else torch.tensor(keep)
    wanted_TK = all_TK if wanted is None else torch.tensor(wanted)
    zeros_TE = torch.zeros(len(experts), E)
    return Routing(torch.tensor(weights), expert_TK, keep_TK, zeros_TE, zeros_TE, wanted_TK)


def test_an_even_load() -> None:
    load = summarise_load(torch.full((3, 4), 7))
    assert load.balance_L == [1.0, 1.0, 1.0]
    assert (load.balance, load.dead_share) == (1.0, 0.0)
    assert load.entropy == pytest.approx(1.0, abs=1e-6)


def test_one_expert_for_all() -> None:
    load = summarise_load(torch.tensor([[8, 0, 0, 0], [0, 0, 5, 0]]))
    assert load.balance_L == [4.0, 4.0]
    assert load.dead_share == 0.75
    assert load.entropy == 0.0


def test_layers_that_collapse_apart_do_not_hide_each_other() -> None:
    counts_LE = torch.tensor([[10, 0], [0, 10]])  # pooled they look even
    assert summarise_load(counts_LE).balance == 2.0
    assert summarise_load(counts_LE.sum(0, keepdim=True)).balance == 1.0


def test_a_load_in_between_and_one_without_any() -> None:
    load = summarise_load(torch.tensor([[3, 1, 0, 0]]))
    assert load.balance == 3.0
    assert load.dead_share == 0.5
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert load.entropy == pytest.approx(entropy, abs=1e-6)
    assert summarise_load(torch.zeros(1, 4)).dead_share == 1.0
    assert math.isfinite(summarise_load(torch.zeros(1, 4)).balance)
    assert summarise_load(torch.tensor([[9]])).entropy == 1.0


def test_specialisation_is_shares_of_each_domain() -> None:
    share_CE = specialisation(torch.tensor([[6, 2, 0], [1, 1, 2], [0, 0, 0]]))
    assert share_CE.dtype == torch.float64
    assert share_CE.tolist() == [[0.75, 0.25, 0.0], [0.25, 0.25, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("C", [2, 4, 8])
def test_mutual_information_of_nothing_and_of_everything(C: int) -> None:
    assert mutual_information(torch.full((C, 8), 5)) == pytest.approx(0.0, abs=1e-9)
    assert mutual_information(torch.eye(C, 8) * 3) == pytest.approx(math.log2(C), abs=1e-6)


def test_mutual_information_weighs_domains_equally() -> None:
    separated = torch.tensor([[1000, 0], [0, 1]])
    assert mutual_information(separated) == pytest.approx(1.0, abs=1e-6)
    # Domain 0 always uses expert 0, domain 1 both: H(expert) - H(expert | domain) = h(3/4) - 1/2.
    half = torch.tensor([[10, 0], [2, 2]])
    h = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert mutual_information(half) == pytest.approx(h - 0.5, abs=1e-6)
    uneven_but_alike = torch.tensor([[9, 1], [90, 10]])
    assert mutual_information(uneven_but_alike) == pytest.approx(0.0, abs=1e-9)


def test_counts_and_drops() -> None:
    one = routing([[0, 1], [1, 2]], [[1.0, 1.0]] * 2, 4, keep=[[True, True], [False, True]])
    two = routing([[3, 0], [3, 1]], [[1.0, 1.0]] * 2, 4)
    assert counts_per_layer([one, two]).tolist() == [[1, 1, 1, 0], [1, 1, 0, 2]]
    assert counts_per_layer([one, two], wanted=True).tolist() == [[1, 2, 1, 0], [1, 1, 0, 2]]
    assert dropped_share([one, two]) == pytest.approx(1 / 8)
    nothing = routing([[0]], [[1.0]], 2, keep=[[False]], wanted=[[False]])
    assert dropped_share([nothing]) == 0.0


def test_dominant_experts_by_hand() -> None:
    made = routing([[0, 1], [0, 2], [1, 0]], [[0.6, 0.2], [0.5, 0.5], [0.9, 0.1]], 4)
    # Scaled to 1 per token: (0: .75, 1: .25), (0: .5, 2: .5), (1: .9, 0: .1).
    best = dominant_experts(made, most=4)
    assert [b.expert for b in best] == [0, 1, 2]  # expert 3 took nothing
    assert [b.confidence for b in best] == pytest.approx([1.35 / 3, 1.15 / 3, 0.5 / 3], abs=1e-6)
    assert [b.top_share for b in best][:2] == pytest.approx([2 / 3, 1 / 3], abs=1e-6)
    assert dominant_experts(made, most=1)[0] == best[0]


def test_confidences_sum_to_one_whatever_the_router_gives() -> None:
    draw = torch.Generator().manual_seed(0)
    expert_TK = torch.stack([torch.randperm(6, generator=draw)[:3] for _ in range(20)])
    for scale in (0.01, 1.0, 7.0):
        weights = (torch.rand(20, 3, generator=draw) * scale).tolist()
        best = dominant_experts(routing(expert_TK.tolist(), weights, 6), most=6)
        assert sum(b.confidence for b in best) == pytest.approx(1.0, abs=1e-5)
        assert sum(b.top_share for b in best) == pytest.approx(1.0, abs=1e-5)
        assert [b.confidence for b in best] == sorted((b.confidence for b in best), reverse=True)


def test_what_was_not_kept_has_no_weight() -> None:
    made = routing([[0, 1], [2, 1]], [[0.9, 0.3], [0.8, 0.2]], 3, keep=[[False, True], [False, False]])
    assert token_weights(made).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    best = dominant_experts(made)
    assert [(b.expert, b.confidence) for b in best] == [(1, 1.0)]
    assert best[0].top_share == 0.5  # one of two tokens; the other had no expert at all
