"""OLMoE's analysis against brute force on real routings, and against routers whose answers are known.

Shape legend: L sparse layers, T tokens, K choices, E experts.
"""

import json
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest
import torch
from tiny_runs import run_tiny, words

import moesaic
from moesaic import cli
from moesaic.analysis import measures
from moesaic.analysis.census import Census, PairCounts
from moesaic.analysis.report import Analysis, analyse
from moesaic.errors import CheckpointError, DataError, RecipeError
from moesaic.routing import Routing

E, K = 6, 3


def quiet(_: str) -> None:
    pass


def drawn(tokens: int, seed: int, dropped: float = 0.0) -> Routing:
    draw = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(tokens, E, generator=draw)
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(K)
    keep_TK = torch.rand(tokens, K, generator=draw) >= dropped
    wanted_TK = torch.ones_like(keep_TK)
    return Routing(weight_TK, expert_TK, keep_TK, logits_TE, logits_TE.softmax(-1), wanted_TK)


@pytest.mark.parametrize("dropped", [0.0, 0.3])
def test_counts_are_those_of_going_through_the_tokens(dropped: float) -> None:
    census, T = Census([0, 1], E, ["a", "b"]), 50
    pairs, adjacent, steps, first = Counter(), Counter(), Counter(), Counter()  # type: ignore[var-annotated]
    by_word: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for batch in range(4):
        routings = [drawn(T, 10 * batch + layer, dropped) for layer in range(2)]
        draw = torch.Generator().manual_seed(batch)
        ids = torch.randint(7, (T,), generator=draw)
        counted = torch.rand(T, generator=draw) > 0.2
        census.add(batch % 2, {"input": ids, "predicted": ids + 7, "true": ids * 2}, counted, routings)
        for t in range(T):
            if not counted[t]:
                continue
            for layer, routing in enumerate(routings):
                kept = [(k, int(e)) for k, e in enumerate(routing.expert_TK[t]) if routing.keep_TK[t, k]]
                for (k, i), (m, j) in combinations(kept, 2):
                    for pair in ((i, j), (j, i)):
                        pairs[layer, *pair] += 1
                        adjacent[layer, *pair] += m == k + 1
                if kept and kept[0][0] == 0:
                    first[layer, batch % 2, kept[0][1]] += 1
                    by_word[layer, int(ids[t])][kept[0][1]] += 1
            if routings[1].keep_TK[t, 0]:
                steps[int(routings[0].expert_TK[t, 0]), int(routings[1].expert_TK[t, 0])] += 1
    for layer in range(2):
        for i in range(E):
            for j in range(E):
                assert census.pair_LEE[layer, i, j] == pairs[layer, i, j]
                assert census.adjacent_LEE[layer, i, j] == adjacent[layer, i, j]
            assert [int(census.first_LCE[layer, c, i]) for c in (0, 1)] == [
                first[layer, c, i] for c in (0, 1)
            ]
        token_n, count_nE = census.words["input"][layer].rows()
        for token, row in zip(token_n.tolist(), count_nE.tolist(), strict=True):
            assert row == [by_word[layer, token][e] for e in range(E)]
        assert census.words["predicted"][layer].rows()[0].tolist() == [n + 7 for n in token_n.tolist()]
    for i in range(E):
        assert census.step_LEE[0, i].tolist() == [steps[i, j] for j in range(E)]


def test_a_pair_count_merges_what_it_saw_before() -> None:
    counts = PairCounts(3)
    for tokens, experts in (([5, 5, 2], [0, 0, 1]), ([2, 5, 9], [1, 2, 0])):
        ones = torch.ones(3, 1, dtype=torch.bool)
        counts.add(torch.tensor(tokens), torch.tensor(experts)[:, None], ones)
    token_n, count_nE = counts.rows()
    assert token_n.tolist() == [2, 5, 9]
    assert count_nE.tolist() == [[0, 2, 0], [2, 0, 1], [1, 0, 0]]


def test_saturation_is_the_shared_part_of_two_sets() -> None:
    one, other = drawn(40, 1).expert_TK, drawn(40, 2).expert_TK
    for k in (1, 2, K):
        shared = [len(set(a[:k].tolist()) & set(b[:k].tolist())) / k for a, b in zip(one, other, strict=True)]
        assert measures.saturation(one, other, k) == pytest.approx(sum(shared) / 40)
    assert measures.saturation(one, one.flip(1), K) == 1.0
    partly = torch.tensor([[3, -1], [1, 2], [-1, -1]])  # one choice, two, none
    assert measures.saturation(torch.tensor([[0, 3], [2, -1], [5, 4]]), partly, 2) == pytest.approx(0.75)
    many = torch.rand(20000, 16).topk(4).indices, torch.rand(20000, 16).topk(4).indices
    assert measures.saturation(*many, 4) == pytest.approx(4 / 16, abs=0.01)


def counted(routing: Routing, domain: list[int] | None = None, ids: list[int] | None = None) -> Census:
    """The census of one layer, each token in its domain."""
    T = len(routing.expert_TK)
    label = torch.tensor(domain or [0] * T)
    token = torch.tensor(ids or [0] * T)
    census = Census([0], routing.num_experts, [str(c) for c in range(int(label.max()) + 1)])
    for c in range(len(census.domains)):
        census.add(c, {"input": token, "predicted": token, "true": token}, label == c, [routing])
    return census


def fixed(experts: list[list[int]], count: int) -> Routing:
    expert_TK = torch.tensor(experts)
    zeros_TE, all_TK = torch.zeros(len(experts), count), torch.ones_like(expert_TK, dtype=torch.bool)
    return Routing(expert_TK.float(), expert_TK, all_TK, zeros_TE, zeros_TE, all_TK)


def test_experts_that_always_come_together() -> None:
    census = counted(fixed([[0, 1], [1, 0], [2, 3], [3, 2]] * 5, 4))
    table = measures.coactivation(census.pair_LEE[0], census.chosen_LCE[0].sum(0))
    assert table.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    three = counted(fixed([[0, 1, 2]], 4))
    assert int(three.pair_LEE[0].sum()) == 6
    assert int(three.adjacent_LEE[0].sum()) == 4  # ranks 1 and 3 are not neighbours


def test_a_random_router_reaches_chance_and_no_more() -> None:
    routing = fixed(torch.rand(30000, 8).topk(3).indices.tolist(), 8)
    ids = torch.randint(40, (30000,)).tolist()
    census = counted(routing, [n % 2 for n in range(30000)], ids)
    chosen_E = census.chosen_LCE[0].sum(0)
    table = measures.coactivation(census.pair_LEE[0], chosen_E)
    off = table[~torch.eye(8, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full_like(off, 2 / 7), atol=0.02, rtol=0)
    torch.testing.assert_close(table.sum(1), torch.full((8,), 2.0).double())
    shares = measures.domain_shares(census.chosen_LCE[0], census.token_C)
    torch.testing.assert_close(shares, torch.full_like(shares, 3 / 8), atol=0.02, rtol=0)
    torch.testing.assert_close(shares.sum(1), torch.full((2,), 3.0).double())
    _, count_nE = census.words["input"][0].rows()
    real, chance = measures.word_shares(count_nE, 10), measures.random_word_shares(count_nE, 10)
    assert len(real) == len(chance) == 40
    assert float(real.mean()) == pytest.approx(float(chance.mean()), abs=0.01)


def test_a_router_by_domain_and_by_word() -> None:
    routing = fixed([[n % 2] for n in range(40)], 2)
    census = counted(routing, [n % 2 for n in range(40)], [n % 2 + 5 for n in range(40)])
    assert measures.domain_shares(census.chosen_LCE[0], census.token_C).tolist() == [[1, 0], [0, 1]]
    _, count_nE = census.words["true"][0].rows()
    assert measures.word_shares(count_nE, 20).tolist() == [1.0, 1.0]
    assert measures.word_shares(count_nE, 21).tolist() == []
    assert measures.random_word_shares(count_nE, 21).tolist() == []
    assert float(measures.random_word_shares(count_nE, 20).max()) < 1


def test_what_one_layer_tells_of_the_next() -> None:
    told = torch.tensor([[5, 0], [0, 5]])
    assert measures.transition_bits(told) == pytest.approx(1.0)
    assert measures.transitions(told).tolist() == [[1, 0], [0, 1]]
    assert measures.transition_bits(torch.full((2, 2), 7)) == pytest.approx(0.0, abs=1e-12)
    assert measures.transitions(torch.tensor([[3, 1], [0, 0]])).tolist() == [[0.75, 0.25], [0, 0]]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, list[str]]:
    run = run_tiny(tmp_path, "run", "train.steps=6", "checkpoint.every=2", "checkpoint.keep=5")
    data = []
    for n, name in enumerate(("mill", "river")):
        file = tmp_path / f"{name}.txt"
        file.write_text(words(300, seed=n))
        data.append(f"{name}={file}")
    return run, data


def test_a_runs_checkpoints_are_compared_with_its_end(
    trained: tuple[Path, list[str]], tmp_path: Path
) -> None:
    run, data = trained
    analysis = analyse([run], data, 400, 16, 3, quiet)
    assert list(analysis.saturation) == ["step 2", "step 4"]
    for early, late in zip(*analysis.saturation.values(), strict=True):
        assert 0 < early[0] <= 1
        assert late[1] >= 0.3
    lm = moesaic.load(run)
    ids = torch.tensor(lm.tokenizer.encode((tmp_path / "mill.txt").read_text())[:400].tolist()).view(25, 16)
    whole = torch.zeros(2, 4, dtype=torch.int64)
    for row in ids:
        for layer, routing in enumerate(lm.routing(row[None])):
            whole[layer] += torch.bincount(routing.expert_TK[:-1].flatten(), minlength=4)
    assert torch.equal(analysis.census.chosen_LCE[:, 0], whole)
    assert analysis.census.token_C.tolist() == [375, 375]
    same = analyse([run, run], data, 400, 16, 3, quiet)
    assert same.saturation[str(run)] == [(1.0, 1.0)] * 2


def test_the_command_writes_numbers_and_figures(
    trained: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, data = trained
    out = tmp_path / "out"
    options = ["--tokens", "300", "--seq-len", "16", "--out", str(out), *[f"--data={word}" for word in data]]
    monkeypatch.setattr(sys, "argv", ["moesaic", "analyze", str(run), *options])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    numbers = json.loads((out / "report.json").read_text())
    assert numbers["top_k"] == 2
    assert len(numbers["vocabulary"]["predicted"]) == 2
    for name in ("domains", "coactivation", "vocabulary", "load", "saturation"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "saturation of step 2" in capsys.readouterr().out


def test_what_cannot_be_analysed_is_named(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    run, data = trained
    (tmp_path / "short.txt").write_text("the old")
    dense = run_tiny(tmp_path, "dense", "train.steps=1", "model.pattern=D")
    wide = run_tiny(tmp_path, "wide", "train.steps=1", "model.experts.count=5")
    for call, sentence, kind in (
        (([dense], data, 400, 16), "dense model", RecipeError),
        (([wide, run], data, 400, 16), "no checkpoint of the model", CheckpointError),
        (([run], ["mill"], 400, 16), "write NAME=FILE", RecipeError),
        (([run], data, 9, 16), "less than one window", RecipeError),
        (([run], [f"short={tmp_path / 'short.txt'}"], 90, 16), "fewer than one window of 16", DataError),
    ):
        with pytest.raises(kind, match=sentence):
            analyse(*call, 3, quiet)
    assert isinstance(analyse([run / "model"], data, 400, 16, 3, quiet), Analysis)
