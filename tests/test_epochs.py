"""Every example once in an epoch, whatever the batch; epochs as steps; the optimizer that goes on."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import rows, run_tiny, tiny

from moesaic.data import epochs
from moesaic.data.corpora import DataOptions
from moesaic.data.examples import ExampleStore
from moesaic.data.pretrain import prepare
from moesaic.errors import RecipeError
from moesaic.train.optim import ScheduleOptions, schedule_factor
from moesaic.train.recipe import load_recipe


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (7, 7), (3, 8), (1, 2), (100, 9)])
def test_all_examples_come_once_before_any_comes_again(size: int, batch: int) -> None:
    taken = np.concatenate([epochs.taken(5, step, batch, size) for step in range(1, 41)])
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))
    orders = [tuple(epochs.order(5, epoch, 100)) for epoch in range(3)]
    assert len({*orders, tuple(epochs.order(6, 0, 100))}) == 4
    assert tuple(epochs.order(5, 1, 100)) == orders[1]


def talks(tmp_path: Path, count: int = 23) -> DataOptions:
    lines = [{"instruction": f"say {n}", "output": f"{chr(97 + n % 26)}" * (1 + n % 9)} for n in range(count)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataOptions(
        source="instructions", path=str(tmp_path / "talks.jsonl"), tokenizer="byte", val_fraction=0.1
    )


def answers(store: ExampleStore, steps: range, batch: int, seq_len: int) -> Counter[str]:
    """What was learnt, answer by answer, over some steps."""
    found: Counter[str] = Counter()
    for step in steps:
        windows = store.batch(1, step, batch, seq_len)
        documents = windows.document_BT
        for b, target in enumerate(windows.target_BT):
            number = torch.ones_like(target) if documents is None else documents[b]
            for n in range(1, int(number.max()) + 1):
                kept = target[(number == n) & (target >= 0)]
                found[bytes(kept.tolist()).decode()] += 1
    return found


def test_fine_tuning_sees_every_conversation_once_in_an_epoch(tmp_path: Path) -> None:
    store = prepare(talks(tmp_path), seq_len=64)
    assert isinstance(store, ExampleStore)
    size = store.rows_per_epoch(1, 64)
    assert size == sum(len(shard.train) for shard in store.shards) == 21
    once = answers(store, range(1, 8), 3, 64)
    assert set(once.values()) == {1}
    assert len(once) == 21
    assert answers(store, range(1, 15), 3, 64) == once + once


def test_packed_rows_of_an_epoch_hold_every_conversation_once(tmp_path: Path) -> None:
    given = talks(tmp_path).model_copy(update={"pack": True})
    store = prepare(given, seq_len=200)
    assert isinstance(store, ExampleStore)
    size = store.rows_per_epoch(1, 200)
    assert 1 < size < 10
    found = answers(store, range(1, size + 1), 1, 200)
    # The last of a row may be cut short, so answers are told apart by their letter.
    assert Counter(text[0] for text in found.elements()) == Counter(
        text[0] for text in answers(prepare(talks(tmp_path), seq_len=200), range(1, 2), 21, 200)
    )
    again = store.batch(1, 2, 3, 200)
    assert torch.equal(store.batch(1, 2, 3, 200).ids_BT, again.ids_BT)


def test_epochs_become_steps(tmp_path: Path) -> None:
    words = ["train.epochs=0.1", "data.max_chars=2000"]
    run = run_tiny(tmp_path, "run", *words)
    text = 2000 * 0.9  # for training
    assert rows(run, "val")[-1]["step"] == -(-round(0.1 * (text // 16)) // 4) == 3
    assert "steps = 3" in (run / "recipe.toml").read_text()
    assert "steps = 3" in (run_tiny(tmp_path, "run", *words, resume=True) / "recipe.toml").read_text()
    assert load_recipe("sft", ["train.steps=7"]).train.epochs is None
    assert load_recipe("sft", []).train.epochs == 2


def test_a_share_of_the_steps_as_warm_up() -> None:
    share, steps = ScheduleOptions(kind="linear", warmup=0.03), 9500
    fixed = ScheduleOptions(kind="linear", warmup=285)
    assert [schedule_factor(share, n, steps) for n in (1, 285, 286, 9500)] == [
        schedule_factor(fixed, n, steps) for n in (1, 285, 286, 9500)
    ]
    assert schedule_factor(share, 1, steps) == 1 / 285
    assert schedule_factor(ScheduleOptions(warmup=0.03), 1, 10) == 1.0


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "muon"])
def test_going_on_with_the_same_batches_is_going_on(tmp_path: Path, kind: str) -> None:
    """Two steps, then two more from there with the optimizer, are four steps of the same batches."""
    from moesaic.train.loop import train_step
    from moesaic.train.session import build_session

    first = run_tiny(tmp_path, "first", "train.steps=2", f"optim.kind={kind}")
    whole = build_session(
        tiny(tmp_path, f"optim.kind={kind}", f"out={tmp_path / 'x'}"), lambda sentence: None
    )
    for step in (1, 2, 3):
        train_step(whole, step)
    parts = build_session(
        tiny(tmp_path, f"start={first}", "start_optimizer=true", f"optim.kind={kind}"), lambda sentence: None
    )
    train_step(parts, 3)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_goes_on_without_what_it_began_from(tmp_path: Path) -> None:
    first = run_tiny(tmp_path, "first", "train.steps=1")
    words = [f"start={first}", "start_optimizer=true"]
    run_tiny(tmp_path, "second", *words, "train.steps=2")
    shutil.rmtree(first / "checkpoints")
    second = run_tiny(tmp_path, "second", *words, "train.steps=3", resume=True)
    assert rows(second, "val")[-1]["step"] == 3


def test_what_has_no_such_optimizer_is_refused(tmp_path: Path) -> None:
    first = run_tiny(tmp_path, "first", "train.steps=1")
    cases = {
        ("start_optimizer=true",): "exists: say start = RUN",
        (f"start={first / 'model'}", "start_optimizer=true"): "holds no optimizer; give a run",
        (f"start={first}", "start_optimizer=true", "optim.kind=rmsprop"): "has no such state of",
        (
            f"start={first}",
            "start_optimizer=true",
            "train.lora.rank=2",
        ): "do not go together",
        (
            f"start={first}",
            "start_optimizer=true",
            'train.freeze=["model.embed_tokens.weight"]',
        ): r"trained other parameters \(model\.embed_tokens\.weight\)",
    }
    for words, reason in cases.items():
        with pytest.raises(RecipeError, match=reason):
            run_tiny(tmp_path, "second", *words)
