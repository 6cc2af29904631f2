"""Beginnings that contexts share: found, read once, and nothing that is computed changes by it."""

import random
from typing import Any

import pytest
import torch
from test_harness import by_going_through, olmoe
from tiny_runs import run_tiny

import moesaic
from moesaic.analysis import contexts
from moesaic.analysis.answers import greedy_answers
from moesaic.analysis.contexts import runs
from moesaic.analysis.scoring import score
from moesaic.lm import LM


def drawn(seed: int, vocabulary: int, longest: int = 60) -> list[tuple[int, ...]]:
    """Contexts of which several share beginnings of every length, some of which are contexts themselves."""
    draw = random.Random(seed)
    found = [tuple(draw.choices(range(vocabulary), k=draw.randint(1, longest))) for _ in range(4)]
    for _ in range(12):
        other = draw.choice(found)
        new = other[: draw.randint(1, len(other))]
        new += tuple(draw.choices(range(vocabulary), k=draw.randint(0, longest - len(new))))
        found.append(new)
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("least", [1, 8, 32])
def test_every_context_is_in_one_run_and_begins_as_the_run_says(
    seed: int, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "_LEAST_SHARED", least)
    given = drawn(seed, 3)
    found = runs(given)
    assert sorted(n for run in found for n in run.numbers) == list(range(len(given)))
    for run in found:
        assert len({given[n][: run.shared] for n in run.numbers}) == 1
        assert all(len(given[n]) > run.shared for n in run.numbers)
        lengths = [len(given[n]) for n in run.numbers]
        assert lengths == sorted(lengths, reverse=True)
        assert not run.shared or (len(lengths) > 1 and run.shared >= least)


def test_questions_of_two_tasks_are_two_runs() -> None:
    first, second = tuple(range(100)), tuple(range(200, 400))
    given = [(*shown, 1000 + n, 7) for shown in (first, second) for n in range(5)] + [(1, 2, 3)]
    found = runs(given)
    assert [(sorted(run.numbers), run.shared) for run in found] == [
        ([0, 1, 2, 3, 4], 100),
        ([5, 6, 7, 8, 9], 200),
        ([10], 0),
    ]


@pytest.fixture(scope="module", params=["olmoe", "conv", "learned"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tmp_path_factory.mktemp("models")
    if request.param == "olmoe":
        return moesaic.load(olmoe(folder / "olmoe", 96))
    words = {"conv": ["model.conv=3"], "learned": ["model.position=learned"]}[request.param]
    more = ["model.context=96", "train.seq_len=32", "optim.lr=0.03", "train.steps=20"]
    return moesaic.load(run_tiny(folder, request.param, *words, *more))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [64, 2048])
def test_scores_do_not_depend_on_what_is_shared(
    lm: LM, seed: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "_LEAST_SHARED", 4)
    monkeypatch.setattr(contexts, "BATCH_TOKENS", budget)
    draw, vocabulary = random.Random(seed), lm.config.vocabulary
    pairs = []
    for before in drawn(seed, vocabulary):
        for _ in range(draw.randint(1, 3)):
            pairs.append((before, draw.choices(range(vocabulary), k=draw.randint(1, 5))))
    told: list[int] = []
    found = score(lm.model, pairs, 60, told.append)
    assert sum(told) == len(pairs)
    for (before, after), one in zip(pairs, found, strict=True):
        total, greedy = by_going_through(lm, list(before), after, 60)
        assert one.logprob == pytest.approx(total, abs=1e-4)
        assert one.greedy == greedy


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_each_prompt_by_itself(
    lm: LM, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "_LEAST_SHARED", 4)
    prompts: list[Any] = [*drawn(seed, lm.config.vocabulary, 40), (1,)]
    told: list[int] = []
    alone = [lm.generate(list(prompt), 17) for prompt in prompts]
    assert greedy_answers(lm, prompts, 96, 17, (), told.append) == alone
    assert sum(told) == len(prompts)
    stops = sorted({text[len(text) // 2] for text in alone if len(text) > 3})[:2]
    cut = [lm.generate(list(prompt), 17, stop=stops) for prompt in prompts]
    assert greedy_answers(lm, prompts, 96, 17, stops) == cut
    assert cut != alone


def test_a_long_prompt_loses_its_beginning(lm: LM) -> None:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, lm.config.vocabulary, (90,), generator=draw).tolist()
    assert greedy_answers(lm, [ids], 50, 10) == greedy_answers(lm, [ids[-40:]], 96, 10)
    with pytest.raises(ValueError, match="at least one token"):
        greedy_answers(lm, [[]], 50, 10)
