"""Token stores: the split, batches as pure functions, exactly-once validation, damage and repair."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.data import pretrain
from moesaic.data.corpora import DataOptions
from moesaic.data.pretrain import prepare
from moesaic.data.store import TokenStore
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError, ResourceError, Stopped

SHAKESPEARE = Path(__file__).parents[1] / ".." / "shared" / "data" / "tiny_shakespeare.txt"


def options(tmp_path: Path, texts: dict[str, str | list[str]], **more: object) -> DataOptions:
    """Domains as text files, or as JSONL files where a list of documents is given."""
    paths = {}
    for label, text in texts.items():
        path = tmp_path / f"{len(paths)}.{'txt' if isinstance(text, str) else 'jsonl'}"
        content = text if isinstance(text, str) else "".join(json.dumps({"text": t}) + "\n" for t in text)
        if not path.exists():
            path.write_text(content, encoding="utf-8")
        paths[label] = str(path)
    return DataOptions.model_validate(
        {"source": "files", "path": paths, "cache": str(tmp_path / "cache"), **more}
    )


def counting(tmp_path: Path, **lengths: int) -> TokenStore:
    """Byte tokens, each domain its own run of letters, so that a row shows where it came from."""
    texts = {label: "".join(chr(97 + i % 23) for i in range(n)) for label, n in lengths.items()}
    return prepare(options(tmp_path, texts, tokenizer="byte", val_fraction=0.25))


def test_split_is_the_first_part_of_each_domain(tmp_path: Path) -> None:
    store = prepare(options(tmp_path, {"one": "abcdefghij", "two": "0123456789" * 2}, val_fraction=0.3))
    assert store.domains == ["one", "two"]
    assert (store.train_tokens, store.val_tokens) == (7 + 14, 3 + 6)
    assert store.tokenizer.kind == "char"
    targets = torch.cat([t for _, t, *_ in store.validation(1, 2)]).flatten().tolist()
    assert store.tokenizer.decode([t for t in targets if t >= 0]) == "ij" + "56789"
    assert [s.documents for s in store.shards] == [1, 1]


def test_documents_are_separated_where_the_tokenizer_has_an_end_token(tmp_path: Path) -> None:
    given = options(tmp_path, {"a": ["ab", "cd"]}, tokenizer="bpe", vocab_size=300, val_fraction=0.01)
    store = prepare(given)
    end = store.tokenizer.eos_id
    assert end is not None
    ids = np.fromfile(store.folder / "a.bin", "<u2").tolist()
    ab, cd = (store.tokenizer.encode(t).tolist() for t in ("ab", "cd"))
    assert ids == [*ab, end, *cd, end]
    assert store.shards[0].tokens == len(ids)
    plain = prepare(given.model_copy(update={"tokenizer": "byte"}))
    assert np.fromfile(plain.folder / "a.bin", "<u2").tolist() == list(b"abcd")


def test_batch_is_a_pure_function_of_seed_and_step(tmp_path: Path) -> None:
    store, again = counting(tmp_path, a=400, b=100), counting(tmp_path, a=400, b=100)
    inputs, targets, *_ = store.batch(3, 5, 6, 8)
    assert inputs.shape == targets.shape == (6, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    store.batch(3, 6, 6, 8)
    for same in (store, again):
        assert torch.equal(same.batch(3, 5, 6, 8)[0], inputs)
    assert not torch.equal(store.batch(3, 6, 6, 8)[0], inputs)
    assert not torch.equal(store.batch(4, 5, 6, 8)[0], inputs)
    assert not torch.equal(store.batch(5, 3, 6, 8)[0], inputs)


def test_rows_are_uniform_over_all_starts_and_stay_in_one_domain(tmp_path: Path) -> None:
    texts = {"upper": "ABCDEFGHIJKL", "lower": "abcdefgh", "digits": "0123"}
    store = prepare(options(tmp_path, texts, tokenizer="byte", val_fraction=0.25))
    windows = {"ABCD", "BCDE", "CDEF", "DEFG", "EFGH", "FGHI", "abcd", "bcde", "cdef"}
    counts = dict.fromkeys(windows, 0)
    for step in range(30):
        inputs, targets, *_ = store.batch(0, step, 30, 3)
        for row, last in zip(inputs, targets[:, -1], strict=True):
            counts[bytes([*row.tolist(), int(last)]).decode()] += 1
    assert min(counts.values()) > 60  # 100 expected of each, standard deviation below 10
    assert any("domain digits has 3 training tokens" in note for note in store.notes)
    assert len(store.notes) == 1


def test_validation_predicts_every_token_once(tmp_path: Path) -> None:
    store = counting(tmp_path, a=100, b=43, c=5)  # 25, 11 and 2 validation tokens
    batches = list(store.validation(4, 8))
    assert [tuple(inputs.shape) for inputs, *_ in batches] == [(4, 8), (2, 8)]  # 3, 2 and 1 windows
    assert all(inputs.dtype == targets.dtype == torch.int64 for inputs, targets, *_ in batches)
    inputs, targets = (torch.cat([batch[i] for batch in batches]) for i in range(2))
    seen = targets != -100
    assert int(seen.sum()) == 24 + 10 + 1
    assert (inputs[~seen] == 0).all()
    whole = [np.fromfile(store.folder / f"{d}.bin", "<u2")[-n:] for d, n in (("a", 25), ("b", 11), ("c", 2))]
    assert targets[seen].tolist() == np.concatenate([ids[1:] for ids in whole]).tolist()
    assert inputs[seen].tolist() == np.concatenate([ids[:-1] for ids in whole]).tolist()
    (only,) = store.validation(10, 8, domain="b")
    assert int((only[1] != -100).sum()) == 10


def test_parts_that_are_too_short(tmp_path: Path) -> None:
    store = counting(tmp_path, a=40, b=3)  # 30 and 2 for training, 10 and 1 for validation
    with pytest.raises(DataError, match=r"training part holds 32 tokens, 30 .*seq_len=30 needs 31.*smaller"):
        store.batch(0, 0, 1, 30)
    assert store.batch(0, 0, 1, 29)[0].shape == (1, 29)
    with pytest.raises(DataError, match=r"validation part holds 11 tokens, 10 .*data\.val_fraction larger"):
        store.validation(1, 10)
    assert len(list(store.validation(1, 9))) == 1
    with pytest.raises(DataError, match="domain b has a single validation token"):
        store.validation(1, 4, domain="b")
    with pytest.raises(DataError, match="no domain 'z'; there are: a, b"):
        store.validation(1, 4, domain="z")


def test_bytes_are_counted_for_each_part(tmp_path: Path) -> None:
    text = "aé漢😀" * 10
    for kind in ("char", "byte", "bpe"):
        store = prepare(options(tmp_path, {"a": [text, text]}, tokenizer=kind, vocab_size=260))
        (shard,) = store.shards
        ids = np.fromfile(store.folder / "a.bin", "<u2")
        expected = store.tokenizer.byte_length(ids[: shard.train_tokens])
        assert shard.train_bytes == expected
        assert shard.train_bytes + shard.val_bytes == 2 * len(text.encode())
        assert store.bytes_per_token("train") == shard.train_bytes / shard.train_tokens
        assert store.bytes_per_token("val", "a") == shard.val_bytes / store.val_tokens


def test_bytes_per_token_of_nothing(tmp_path: Path) -> None:
    store = prepare(options(tmp_path, {"a": "x"}))
    assert (store.train_tokens, store.val_tokens) == (0, 1)
    assert store.bytes_per_token("val") == 1.0
    with pytest.raises(DataError, match="the train part of this corpus holds no tokens"):
        store.bytes_per_token("train")


def test_wide_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    import tokenizers

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(65_537)}, "w0")
    model = tokenizers.Tokenizer(words)
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "tokenizer.json"))
    given = options(tmp_path, {"a": "w65536 w1 w2 w3"}, tokenizer=str(tmp_path / "tokenizer.json"))
    store = prepare(given)
    assert np.fromfile(store.folder / "a.bin", "<u4").tolist() == [65_536, 1, 2, 3]
    assert store.batch(0, 0, 1, 2)[0].max() < 65_537


def test_second_preparation_opens_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    first = prepare(given)
    monkeypatch.setattr(pretrain, "_build", None)  # building again would fail
    assert prepare(given).folder == first.folder
    names = ["a.bin", "a.ends", "meta.json", "tokenizer.json"]
    assert sorted(p.name for p in first.folder.iterdir()) == names
    assert [p.name for p in first.folder.parent.iterdir()] == [first.folder.name]


def test_what_decides_the_tokens_decides_the_folder(tmp_path: Path) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    changes: list[dict[str, object]] = [
        {},
        {"val_fraction": 0.2},
        {"tokenizer": "byte"},
        {"tokenizer": "bpe"},
        {"tokenizer": "bpe", "vocab_size": 258},
        {"max_chars": 50},
    ]
    folders = {prepare(given.model_copy(update=change)).folder for change in changes}
    assert len(folders) == len(changes)
    assert prepare(given.model_copy(update={"vocab_size": 999})).folder in folders  # read by bpe alone


@pytest.mark.parametrize("name", ["a.bin", "a.ends", "tokenizer.json", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_found_and_mended(tmp_path: Path, name: str, damage: str) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    store = prepare(given)
    path = store.folder / name
    good = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(good[:-1])
    else:
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        path.write_bytes(bytes(bad))
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        TokenStore(store.folder)
    said: list[str] = []
    mended = prepare(given, progress=said.append)
    assert any(name in sentence and "it is built again" in sentence for sentence in said)
    assert path.read_bytes() == good
    assert torch.equal(mended.batch(0, 0, 2, 4)[0], store.batch(0, 0, 2, 4)[0])
    assert len(list(store.folder.parent.iterdir())) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_concurrent_preparations_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    if damaged:
        (prepare(given).folder / "a.bin").write_bytes(b"")
    barrier, locked, build, built = threading.Barrier(2), pretrain._locked, pretrain._build, []
    stores: list[TokenStore] = []

    def together(*arguments: Any) -> Any:
        barrier.wait(10)
        return locked(*arguments)

    def counted(*arguments: Any) -> None:
        built.append(1)
        build(*arguments)

    monkeypatch.setattr(pretrain, "_locked", together)
    monkeypatch.setattr(pretrain, "_build", counted)
    threads = [threading.Thread(target=lambda: stores.append(prepare(given))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(stores) == 2
    assert stores[0].folder == stores[1].folder
    assert len(built) == 1
    assert len(list(stores[0].folder.parent.iterdir())) == 1


def test_a_folder_whose_lock_was_of_a_removed_one_is_built_by_one(tmp_path: Path) -> None:
    folder, order = tmp_path / ".building-x", []

    def hold(name: str) -> None:
        with pretrain._locked(folder, lambda sentence: None):
            order.append(f"{name} in")
            time.sleep(0.3)
            os.rmdir(folder)
            order.append(f"{name} out")

    threads = [threading.Thread(target=hold, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(20)
    assert [entry.split()[1] for entry in order] == ["in", "out"] * 3
    folder.mkdir()
    again = pretrain._locked(folder, lambda sentence: None, lambda: True)
    with pretrain._locked(folder), pytest.raises(Stopped, match="waiting for another"), again:
        pass


def test_the_tokenizer_learns_the_text_as_it_is_cleaned(tmp_path: Path) -> None:
    given = options(tmp_path, {"a": "cafe\u0301 au lait " * 50}, clean={"normalise": True})
    assert prepare(given).tokenizer.vocab_size == len(set("caf\u00e9 au lait "))


def test_the_fingerprint_is_of_the_tokens_not_of_the_file(tmp_path: Path) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    first = prepare(given)
    os.utime(tmp_path / "0.txt", (1, 1))
    touched = prepare(given)
    assert touched.folder != first.folder
    assert touched.fingerprint == first.fingerprint
    (tmp_path / "0.txt").write_text("some test " * 9)
    assert prepare(given).fingerprint != first.fingerprint


def test_what_nobody_went_on_with_is_removed_and_what_is_being_built_is_not(tmp_path: Path) -> None:
    given = options(tmp_path, {"a": "some text " * 9})
    cache = prepare(given).folder.parent
    left, live, young = (cache / f".building-{name}" for name in ("left", "live", "young"))
    for folder in (left, live, young):
        folder.mkdir()
        (folder / "a.bin").write_bytes(b"half")
    for folder in (left, live):
        os.utime(folder, (1, 1))
    (tmp_path / "0.txt").write_text("other text " * 9)
    with pretrain._locked(live), pytest.raises(Stopped):
        prepare(given, stopped=lambda: True)
    (mine,) = {*cache.glob(".building-*")} - {live, young}
    os.utime(mine, (1, 1))  # long ago, and now gone on with
    inode = mine.stat().st_ino
    with pretrain._locked(live):
        assert prepare(given).folder.stat().st_ino == inode
    assert [folder.exists() for folder in (left, live, young)] == [False, True, True]


def test_bad_text_leaves_nothing_and_a_full_disk_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(tmp_path, {"a": ["good", "bad"]}, tokenizer=str(tmp_path / "t.json"))
    Tokenizer.char(["god"]).save(tmp_path / "t.json")
    with pytest.raises(DataError, match=r"domain a, documents 1 to 2: character 'b' .* at position 0"):
        prepare(given)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    plain = given.model_copy(update={"tokenizer": "byte"})
    with pytest.raises(ResourceError, match="the disk is full; make room and repeat the command"):
        prepare(plain)
    monkeypatch.undo()
    assert len(list((tmp_path / "cache" / "tokens").glob(".building-*"))) == 1
    assert prepare(plain).shards[0].tokens == len("goodbad")
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_bad_tokenizers_and_caches(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.tokenizer=wordpiece: neither char, byte, bpe nor"):
        prepare(options(tmp_path, {"a": "text"}, tokenizer="wordpiece"))
    with pytest.raises(DataError, match="vocab_size=100 is too small"):
        prepare(options(tmp_path, {"a": "text"}, tokenizer="bpe", vocab_size=100))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written.*data\.cache"):
        prepare(options(tmp_path, {"a": "text"}, cache=str(tmp_path / "file")))


def test_domains_without_text(tmp_path: Path) -> None:
    store = prepare(options(tmp_path, {"a": "text", "void": [""]}))
    assert store.domains == ["a"]
    assert store.notes == ["domain void holds no text and is left out"]
    (tmp_path / "1.txt").write_text("\ufeff", encoding="utf-8")
    with pytest.raises(DataError, match="there is no text in it"):
        prepare(
            DataOptions(
                source="files", path=str(tmp_path / "1.txt"), tokenizer="byte", cache=str(tmp_path / "c")
            )
        )


def test_domain_names_become_safe_file_names(tmp_path: Path) -> None:
    texts = {"../up": "one text", "..\\up": "two text", "Üp/x": "three", "A": "four", "a": "five"}
    store = prepare(options(tmp_path, texts))
    assert store.domains == list(texts)
    names = [shard.file for shard in store.shards]
    assert names == ["_up.bin", "_up-2.bin", "_p_x.bin", "A.bin", "a-2.bin"]
    assert all((store.folder / name).is_file() for name in names)


def test_stdlib_needs_no_file_and_no_network(tmp_path: Path) -> None:
    said: list[str] = []
    store = prepare(DataOptions(max_chars=3_000, cache=str(tmp_path)), progress=said.append)
    assert {"prose", "code"} <= set(store.domains)
    assert store.train_tokens + store.val_tokens == 3_000 * len(store.domains)
    assert [line.split(":")[0] for line in said] == store.domains


def test_tiny_shakespeare_splits_as_makemoe_does(tmp_path: Path) -> None:
    if not SHAKESPEARE.exists():
        pytest.skip("../shared/data/tiny_shakespeare.txt is not here")
    given = DataOptions(source="tiny_shakespeare", path=str(SHAKESPEARE), cache=str(tmp_path))
    store = prepare(given)
    assert store.tokenizer.vocab_size == 65
    assert store.train_tokens == 1_003_854
    assert store.train_tokens + store.val_tokens == 1_115_394
    assert store.bytes_per_token("train") == 1.0


def test_importing_the_data_layer_imports_no_torch() -> None:
    code = "import sys, moesaic.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
