"""The patterns that come along, the tasks that they give, and the order of domains."""

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from tiny_runs import rows, run_tiny, stop_during, weights

import moesaic
from moesaic.analysis.harness import Suite
from moesaic.data.corpora import DataOptions
from moesaic.data.curriculum import DOMAINS, PARTS, builtin_patterns, by_domain, read_patterns
from moesaic.data.examples import ExampleStore
from moesaic.data.pretrain import prepare
from moesaic.errors import DataError, Stopped
from moesaic.train.curriculum import Curriculum, CurriculumOptions

PATTERNS = read_patterns(builtin_patterns())


def test_there_are_as_many_as_promised_in_every_domain() -> None:
    assert len(PATTERNS) == 308
    assert {name: len(found) for name, found in by_domain(PATTERNS).items()} == dict.fromkeys(DOMAINS, 22)
    assert sum(1 for pattern in PATTERNS for _ in pattern.tasks()) == 1232


def test_every_part_is_substantial_and_plain() -> None:
    for line in builtin_patterns().read_text(encoding="utf-8").splitlines():
        assert list(json.loads(line)) == ["domain", "title", *PARTS]
    for pattern in PATTERNS:
        for part in PARTS:
            words = pattern.parts[part].split()
            assert 15 <= len(words) <= 60, (pattern.title, part, len(words))
            assert pattern.parts[part][-1] in ".!?"
            assert not re.search(r"\b(OBSERVE|PRIOR|UPDATE|RIPPLE|ANALOGY|ACT)\b", pattern.parts[part])


def test_no_two_are_near_duplicates_and_no_sentence_comes_twice() -> None:
    sentences = Counter(
        sentence.strip()
        for pattern in PATTERNS
        for part in PARTS
        for sentence in re.split(r"(?<=[.!?]) ", pattern.parts[part])
        if len(sentence.split()) > 4
    )
    assert [text for text, count in sentences.items() if count > 1] == []
    shingles = []
    for pattern in PATTERNS:
        words = " ".join(pattern.parts.values()).lower().split()
        shingles.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    most = max(len(a & b) / len(a | b) for a, b in itertools.combinations(shingles, 2))
    assert most < 0.05


def test_only_what_is_to_be_produced_is_learnt() -> None:
    store = prepare(DataOptions(source="curriculum", tokenizer="byte"), seq_len=4096)
    assert isinstance(store, ExampleStore)
    assert store.domains == list(DOMAINS)
    texts = {wanted.strip() for pattern in PATTERNS for _, wanted in pattern.tasks()}
    ids, learnt = store.shards[0].train[0]
    assert bytes(ids[learnt].tolist()).decode().strip() in texts
    given = bytes(ids[~learnt].tolist()).decode()
    assert given.startswith("OBSERVE: ")
    assert given.rstrip(":").rpartition("\n")[2] in ("UPDATE", "RIPPLE", "ANALOGY", "ACT")
    for shard in store.shards:  # a pattern's four tasks are on one side
        assert len(shard.train) % 4 == len(shard.val) % 4 == 0
        assert len(shard.val) > 0
    batch = store.batch(1, 3, 5, 4096, "physics")
    own = {bytes(ids[learnt].tolist()) for ids, learnt in store.shards[2].train}
    for target in batch.target_BT:
        assert bytes(target[target >= 0].tolist()) in own


def test_a_long_task_loses_its_beginning() -> None:
    store = prepare(DataOptions(source="curriculum", tokenizer="byte"), seq_len=300)
    assert isinstance(store, ExampleStore)
    ids, learnt = store.shards[0].train[3]
    assert len(ids) == 301
    assert learnt[-1]


def test_a_pattern_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    lines = builtin_patterns().read_text(encoding="utf-8").splitlines()[:3]
    broken = json.loads(lines[1])
    file = tmp_path / "mine.jsonl"
    for change, reason in (
        ({"ripple": ""}, r"mine\.jsonl:2: has no 'ripple'"),
        ({"act": 3}, r"mine\.jsonl:2: field 'act' holds int"),
        ({"title": json.loads(lines[0])["title"]}, "comes twice"),
    ):
        file.write_text("\n".join([lines[0], json.dumps({**broken, **change}), lines[2]]))
        with pytest.raises(DataError, match=reason):
            prepare(DataOptions(source="curriculum", path=str(file), tokenizer="byte"))


def stages_of(order: str, steps: int = 60, seed: int = 1) -> list[str]:
    options = CurriculumOptions.model_validate({"order": order, "stage": 4, "visit": 3})
    curriculum, found = Curriculum(options, list("abcd"), seed), []
    for step in range(steps):
        domain = curriculum.domain()
        assert domain is not None
        ended = curriculum.after_step(5.0 - 0.05 * step)
        if ended is not None:
            found.append(domain)
            assert ended["domain"] == domain
    return found


def test_orders() -> None:
    assert stages_of("fixed")[:6] == list("abcdab")
    shuffled = stages_of("shuffled")
    assert sorted(shuffled[:4]) == list("abcd")
    assert shuffled[:4] == shuffled[4:8] != list("abcd")
    assert stages_of("shuffled", seed=5)[:4] != shuffled[:4]
    drawn = stages_of("dopamine", 300)
    assert set(drawn) == set("abcd")
    assert stages_of("dopamine", 300) == drawn
    mixed = Curriculum(CurriculumOptions(), list("abcd"), 1)
    assert mixed.domain() is None
    assert mixed.after_step(1.0) is None


def test_a_stage_ends_early_when_nothing_gets_better() -> None:
    options = CurriculumOptions(order="fixed", stage=100, patience=5)
    curriculum = Curriculum(options, ["a", "b"], 1)
    steps = 0
    while curriculum.domain() == "a":
        curriculum.after_step(2.0)
        steps += 1
    assert steps == 1 + 5


def test_dopamine_prefers_what_is_new_and_what_is_weak() -> None:
    options = CurriculumOptions(order="dopamine", visit=1, temperature=0.05)
    curriculum = Curriculum(options, ["known", "weak", "new"], 1)
    for name, loss in (("known", 1.0), ("weak", 3.0)):
        curriculum.seen[name].visits, curriculum.seen[name].recent = 4, loss
    rewards = curriculum.rewards()
    assert rewards["new"] > rewards["weak"] > rewards["known"]
    state = json.loads(json.dumps(curriculum.state()))
    other = Curriculum(options, ["known", "weak", "new"], 1)
    other.restore(state)
    assert other.rewards() == rewards


WORDS = [
    *("data.source=curriculum", "data.tokenizer=byte", "train.seq_len=64", "model.context=64"),
    *("curriculum.stage=3", "train.steps=12", "train.batch_size=2"),
]


@pytest.mark.parametrize("order", ["fixed", "dopamine"])
def test_stages_are_saved_and_a_resumed_run_takes_up_its_domain(
    tmp_path: Path, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WORDS, f"curriculum.order={order}", "curriculum.visit=3"]
    whole = run_tiny(tmp_path, "whole", *words)
    stages = rows(whole, "stage")
    assert [row["step"] for row in stages] == [3, 6, 9, 12]
    if order == "fixed":
        assert [row["domain"] for row in stages] == list(DOMAINS[:4])
    for at in (5, 9):
        with monkeypatch.context() as patch:
            stop_during(patch, at)
            with pytest.raises(Stopped):
                run_tiny(tmp_path, "parts", *words, resume=(tmp_path / "parts").exists())
    parts = run_tiny(tmp_path, "parts", *words, resume=True)
    assert weights(parts) == weights(whole)
    assert rows(parts, "stage") == stages


def test_text_has_domains_too(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name * 400)
    path = f'data.path={{one = "{tmp_path / "one.txt"}", two = "{tmp_path / "two.txt"}"}}'
    run = run_tiny(tmp_path, "run", path, "curriculum.order=fixed", "curriculum.stage=2", "train.steps=6")
    assert [row["domain"] for row in rows(run, "stage")] == ["one", "two", "one"]


def test_contrasts_come_along_and_tell_good_from_bad(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (file,) = builtin_patterns().parent.glob("contrast.jsonl")
    cases = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    groups = Counter(case["group"] for case in cases)
    expected = {"transfer", "contradiction", "causal_chain", "cross_domain_analogy", "self_correction"}
    assert dict(groups) == dict.fromkeys(expected, 24)
    assert len({case["context"] for case in cases}) == len(cases)
    lengths = [len(case["good"].split()) - len(case["bad"].split()) for case in cases]
    assert max(map(abs, lengths)) <= 3
    longer = sum(len(case["good"]) > len(case["bad"]) for case in cases)
    assert 0.35 < longer / len(cases) < 0.65  # length does not give the answer away
    assert not {case["context"] for case in cases} & {p.parts["observe"] for p in PATTERNS}


def test_a_contrast_is_measured_as_a_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    run = run_tiny(tmp_path, "run", "data.tokenizer=byte", "model.context=400", "train.steps=1")
    suite = Suite(local={"contrast": Path("shipped")}, limit=2)
    found = suite.run(moesaic.load(run), lambda sentence: None)
    assert found["contrast"]["samples"] == 10
    assert 0 <= found["contrast"]["acc"] <= 1
    assert found["contrast"]["acc stderr"] > 0 or found["contrast"]["acc"] in (0, 1)
    (tmp_path / "mine.jsonl").write_text('{"group": "a", "context": "b", "good": "c"}')
    with pytest.raises(DataError, match=r"mine\.jsonl:1: no field 'bad'"):
        Suite(local={"contrast": tmp_path / "mine.jsonl"}).check()
