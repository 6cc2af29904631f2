"""Losses by document, paired intervals, and what is concluded from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_donors import TEMPLATE, chat_template, dense

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.analysis.compare import (  # noqa: E402
    Comparison,
    Documents,
    gap_closed,
    held_out,
    losses_of,
    oracle,
    switching,
    verdict,
)
from moesaic.data.corpora import DataOptions  # noqa: E402
from moesaic.data.examples import ExampleStore, prepare_examples  # noqa: E402


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = dense(tmp_path / "base")
    chat_template(directory, TEMPLATE)
    return directory


def store_of(base: Path) -> ExampleStore:
    paths = {}
    for name, words in (("mill", "the old mill turns"), ("sums", "1, 2, 3.")):
        file = base.parent / f"{name}.jsonl"
        rows = [{"instruction": words[: 2 + n % 7], "output": words * (1 + n % 3)} for n in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(file)
    options = DataOptions(
        source="instructions", path=paths, tokenizer=str(base / "tokenizer.json"), val_fraction=0.2
    )
    tokenizer = moesaic.load(base).tokenizer
    return prepare_examples(options, tokenizer, 60, lambda _: None)


def test_a_documents_loss_is_that_of_its_targets_alone(base: Path) -> None:
    store, lm = store_of(base), moesaic.load(base)
    documents = held_out(store)
    assert documents.domain_N.tolist() == sorted(documents.domain_N.tolist())
    assert len(documents.coded) == sum(len(shard.val) for shard in store.shards)
    sums, counts = losses_of(lm.model, documents, 60)
    for n, (ids, learnt) in enumerate(documents.coded):
        ids, learnt = ids[:61], learnt[:61]
        logits = lm.logits(torch.tensor(ids[None, :-1]).long())[0].log_softmax(-1)
        loss = -logits[np.arange(len(ids) - 1), ids[1:].astype(int)].double()
        assert counts[n] == learnt[1:].sum()
        assert sums[n] == pytest.approx(float(loss[torch.tensor(learnt[1:])].sum()), rel=1e-5)


def test_switching_documents_are_halves_of_two_domains(base: Path) -> None:
    documents = switching(store_of(base), 40, most=10)
    assert documents is not None
    assert len(documents.coded) == 10
    tokenizer = moesaic.load(base).tokenizer
    for ids, _ in documents.coded:
        text = tokenizer.decode(ids)
        assert "th" in text
        assert "1" in text
    again = switching(store_of(base), 40, most=10)
    assert again is not None
    assert again.coded[3][0].tolist() == documents.coded[3][0].tolist()
    assert switching(store_of(base), 2) is None  # nothing is left to predict in a half of one token


def made(
    shift: float, noise: float, seed: int = 0
) -> tuple[Documents, dict[str, tuple[np.ndarray, np.ndarray]]]:
    generator = np.random.default_rng(seed)
    domain_N = np.array([0] * 300 + [1] * 30)
    documents = Documents(["a", "b"], [(np.zeros(1, np.int32), np.ones(1, bool))] * 330, domain_N)
    counts = generator.integers(5, 50, 330).astype(float)
    mean = np.where(domain_N == 0, 2.0, 4.0) + generator.normal(0, 1, 330)
    other = mean + shift + generator.normal(0, noise, 330)
    return documents, {"base": (mean * counts, counts), "ours": (other * counts, counts)}


def test_intervals_are_paired_and_domains_weigh_the_same() -> None:
    documents, losses = made(-0.1, 0.2)
    comparison = Comparison(documents, "base", losses)
    exact, low, high = comparison.difference("ours", "base")
    assert low < exact < high < 0
    assert high - low < 0.15  # documents differ by 1, the models by 0.2: unpaired it would be some 0.8
    by_hand = []
    for c in (0, 1):
        members = documents.domain_N == c
        sums = [losses[name][0][members].sum() for name in ("ours", "base")]
        by_hand.append((sums[0] - sums[1]) / losses["base"][1][members].sum())
    assert exact == pytest.approx(np.mean(by_hand))
    assert comparison.rows()[1].loss == pytest.approx(comparison.loss("ours"))
    assert len(comparison.table(200).columns) == 5
    assert len(comparison.table(40).columns) == 3
    assert comparison.domain_table(["ours"]).row_count == 2


def test_the_interval_covers_what_it_should() -> None:
    inside = 0
    for seed in range(60):
        documents, losses = made(-0.1, 0.5, seed)
        _, low, high = Comparison(documents, "base", losses, seed).difference("ours", "base")
        inside += low <= -0.1 <= high
    assert inside >= 50  # 57 are expected


def test_the_verdict_is_bad_news_where_the_numbers_are() -> None:
    documents, losses = made(-0.1, 0.2)
    losses["best"] = (losses["base"][0] - 0.2 * losses["base"][1], losses["base"][1])
    comparison = Comparison(documents, "base", losses)
    assert verdict(comparison, "ours", ["base"], "best") == [
        "ours is better than base, each interval clear of zero.",
        f"It closes {100 * gap_closed(comparison, 'ours', 'best'):.0f} % of the gap from base to best.",
    ]
    assert "NOT clearly better than best (worse)" in verdict(comparison, "ours", ["base", "best"])[0]
    documents, losses = made(0.0, 0.5)
    assert "no clear difference" in verdict(Comparison(documents, "base", losses), "ours", ["base"])[0]


def test_the_oracle_takes_each_document_from_its_own_expert() -> None:
    documents, losses = made(-0.1, 0.2)
    sums, _ = oracle(documents, losses, {"a": "base", "b": "ours"})
    assert (sums[:300] == losses["base"][0][:300]).all()
    assert (sums[300:] == losses["ours"][0][300:]).all()


def test_what_is_no_number_is_no_better_and_a_gap_must_be_there() -> None:
    documents, losses = made(-0.1, 0.2)
    sums, counts = losses["ours"]
    broken = {**losses, "ours": (sums * np.nan, counts), "twin": losses["base"]}
    comparison = Comparison(documents, "base", broken)
    assert verdict(comparison, "ours", ["base"]) == [
        "ours is NOT clearly better than base (no clear difference)."
    ]
    assert gap_closed(comparison, "base", "twin") is None
    assert "no gap to close" in verdict(comparison, "base", ["twin"], "twin")[1]
