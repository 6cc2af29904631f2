"""Preparations that are interrupted at any document, and what cleaning and documents leave in a store."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import rows, run_tiny

from moesaic.config import validate
from moesaic.data import sharding
from moesaic.data.corpora import DataOptions
from moesaic.data.pretrain import prepare
from moesaic.data.store import TokenStore
from moesaic.errors import DataError, RecipeError, Stopped


def corpus(tmp_path: Path, documents: int = 40) -> DataOptions:
    """Two domains of random words, with duplicates within and between them."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefghij", k=draw.randint(5, 40))) for _ in range(documents)]
    texts[7], texts[documents // 2 + 3] = texts[2], texts[4]
    paths = {}
    for n, label in enumerate(("one", "two")):
        part = texts[n * documents // 2 : (n + 1) * documents // 2]
        path = tmp_path / f"{label}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        paths[label] = str(path)
    return DataOptions.model_validate(
        {"source": "files", "path": paths, "tokenizer": "bpe", "vocab_size": 300}
    )


def files_of(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.folder.iterdir())}


@pytest.mark.parametrize("clean", [{}, {"exact_duplicates": True}, {"near_duplicates": 0.9, "min_chars": 20}])
def test_stopped_after_any_batch_it_goes_on_to_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean: dict[str, object]
) -> None:
    given = corpus(tmp_path).model_copy(update={"clean": validate_clean(clean)})
    monkeypatch.setattr(sharding, "_BATCH_CHARS", 100)
    whole = prepare(given.model_copy(update={"cache": str(tmp_path / "whole")}))
    parts, said, stops = given.model_copy(update={"cache": str(tmp_path / "parts")}), [], 0
    append, written = sharding._Writer._append, [0]

    def counted(*arguments: object) -> None:
        append(*arguments)
        written[0] += 1

    monkeypatch.setattr(sharding._Writer, "_append", counted)
    while True:
        written[0] = 0
        try:
            store = prepare(parts, progress=said.append, stopped=lambda: written[0] == 2)
        except Stopped:
            stops += 1
        else:
            break
    assert stops > 3
    assert any("was interrupted" in sentence for sentence in said)
    assert files_of(store) == files_of(whole)
    assert store.fingerprint == whole.fingerprint
    assert (store.shards[0].dropped != {}) == bool(clean)


def validate_clean(clean: dict[str, object]) -> object:
    return DataOptions.model_validate({"clean": clean}).clean


def test_killed_in_the_middle_it_goes_on_to_the_same_store(tmp_path: Path) -> None:
    given = corpus(tmp_path, documents=400)
    program = (
        "import sys, time\n"
        "from moesaic.data import sharding\n"
        "from moesaic.data.corpora import DataOptions\n"
        "from moesaic.data.pretrain import prepare\n"
        "sharding._BATCH_CHARS, sharding.COMMIT_SECONDS = 200, 0.0\n"
        "append = sharding._Writer._append\n"
        "def slowly(*arguments):\n"
        "    append(*arguments); time.sleep(0.01)\n"
        "sharding._Writer._append = slowly\n"
        "prepare(DataOptions.model_validate_json(sys.argv[1]))\n"
    )
    killed = 0
    for attempt in range(12):
        command = [sys.executable, "-c", program, cached(given, tmp_path / "killed").model_dump_json()]
        process = subprocess.Popen(command)
        journal = None
        while process.poll() is None and journal is None:
            journal = next((tmp_path / "killed").glob("tokens/.building-*/journal.json"), None)
            time.sleep(0.01)
        time.sleep(0.05 + 0.03 * attempt)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    store, whole = prepare(cached(given, tmp_path / "killed")), prepare(cached(given, tmp_path / "whole"))
    assert killed > 1
    assert files_of(store) == files_of(whole)


def cached(given: DataOptions, cache: Path) -> DataOptions:
    return given.model_copy(update={"cache": str(cache)})


def test_a_journal_that_lies_is_told_and_begun_anew(tmp_path: Path) -> None:
    given = cached(corpus(tmp_path), tmp_path / "cache")
    with pytest.raises(Stopped, match="stopped while training a tokenizer"):
        prepare(given, stopped=lambda: True)
    given = given.model_copy(update={"tokenizer": "byte"})
    with pytest.raises(Stopped, match="the same command goes on from here"):
        prepare(given, stopped=lambda: True)
    (building,) = (path.parent for path in (tmp_path / "cache" / "tokens").glob(".building-*/one.bin"))
    os.truncate(building / "one.bin", 3)
    with pytest.raises(DataError, match=r"one\.bin: is shorter than its journal says; .* begins anew"):
        prepare(given)
    assert files_of(prepare(given)) == files_of(prepare(cached(given, tmp_path / "other")))


def test_what_was_left_out_is_counted_by_domain_and_reason(tmp_path: Path) -> None:
    given = corpus(tmp_path).model_copy(update={"clean": validate_clean({"exact_duplicates": True})})
    store = prepare(cached(given, tmp_path / "cache"))
    assert [shard.dropped for shard in store.shards] == [{"are duplicates": 1}] * 2
    assert [shard.documents for shard in store.shards] == [19, 19]


def test_documents_of_a_window_are_numbered_and_attention_stops_between_them(tmp_path: Path) -> None:
    given = cached(corpus(tmp_path), tmp_path / "cache").model_copy(update={"document_mask": True})
    store = prepare(given)
    end = store.tokenizer.eos_id
    plain = prepare(given.model_copy(update={"document_mask": False}))
    assert store.fingerprint != plain.fingerprint
    batch, same = store.batch(3, 1, 8, 64), plain.batch(3, 1, 8, 64)
    assert torch.equal(batch.ids_BT, same.ids_BT)
    assert same.document_BT is None
    assert batch.document_BT is not None
    for ids, document in zip(batch.ids_BT, batch.document_BT, strict=True):
        begins = (ids[:-1] == end).nonzero()[:, 0]
        assert torch.equal(document.diff().nonzero()[:, 0], begins)
        assert (document.diff() >= 0).all()
    (first, *_) = store.validation(2, 32)
    whole = np.fromfile(store.folder / "one.bin", "<u2")
    start = store.shards[0].train_tokens
    number = 1 + int((whole[:start] == end).sum())
    assert first.document_BT is not None
    assert int(first.document_BT[0, 0]) == number


def test_a_model_trains_on_masked_documents(tmp_path: Path) -> None:
    path = corpus(tmp_path).path
    assert isinstance(path, dict)
    inline = ", ".join(f'{label} = "{file}"' for label, file in path.items())
    words = [f"data.path={{{inline}}}", "data.tokenizer=bpe"]
    masked = run_tiny(tmp_path, "masked", *words, "data.document_mask=true")
    plain = run_tiny(tmp_path, "plain", *words)
    (first,), (second,) = rows(masked, "val"), rows(plain, "val")
    assert first["loss"] != second["loss"]


def test_a_domain_that_loses_all_says_why(tmp_path: Path) -> None:
    (tmp_path / "good.txt").write_text("a sentence that is as it should be. ")
    (tmp_path / "bad.txt").write_text("ha " * 300)
    given = {"source": "files", "tokenizer": "byte", "cache": str(tmp_path), "clean": {"repeats": 32}}
    bad, good = str(tmp_path / "bad.txt"), str(tmp_path / "good.txt")
    store = prepare(DataOptions.model_validate({**given, "path": [good, bad]}))
    assert store.notes == ["domain bad loses all of its documents: 1 repeat themselves"]
    with pytest.raises(DataError, match=r"bad: data\.clean leaves nothing: 1 repeat themselves"):
        prepare(DataOptions.model_validate({**given, "path": bad}))


def test_cleaning_is_for_texts() -> None:
    with pytest.raises(RecipeError, match="clean and document_mask are for texts"):
        validate(DataOptions, {"source": "instructions", "path": "x", "clean": {"repeats": 32}}, "here")
