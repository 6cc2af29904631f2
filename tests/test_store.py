"""The store of experts: kills, full disks, damage, two writers, and that nothing referred to is written
over."""

import errno
import mmap
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
from disk_experts import L, disk, options
from test_disk_experts import train, weights_of

import moesaic
from moesaic.errors import CheckpointError, RecipeError, ResourceError
from moesaic.native import library
from moesaic.offload import records
from moesaic.offload import store as store_module
from moesaic.offload.store import Index, Store


def buffer(store: Store) -> memoryview:
    return memoryview(mmap.mmap(-1, store.record))


def test_a_new_store_takes_no_room_and_its_experts_follow_from_the_seed(tmp_path: Path) -> None:
    given = options(experts=5000)
    store = Store.open(tmp_path / "a", given, write=True)
    other = Store.open(tmp_path / "b", given, write=True)
    changed = Store.open(tmp_path / "c", options(experts=5000, seed=8), write=True)
    assert store.disk_bytes() == 0
    a, b, c = (buffer(store) for _ in range(3))
    seen = set()
    for expert in (0, 1, 4999):
        for layer in range(L):
            store.read(layer, expert, a)
            other.read(layer, expert, b)
            changed.read(layer, expert, c)
            assert bytes(a) == bytes(b) != bytes(c)
            seen.add(bytes(a))
    assert len(seen) == 6


def test_untouched_weights_are_philox_with_a_compiler_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    # The known answer of Random123's philox4x32_10 for a counter and a key of zeros.
    words = records._philox(1, 0, 0, 0).view("<u4")
    assert [hex(word) for word in words] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    shape, found = records.ExpertShape("swiglu", 48, 37), []
    for native in (True, False):
        if native and not library.available():
            continue
        monkeypatch.setattr(library, "available", lambda native=native: native)
        found.append(records.initial_weights(shape, (0.02, 0.5), 2**62 + 12345, 3, 4095))
    for other in found[1:]:
        assert np.array_equal(found[0], other)
    cut = shape.inner * shape.width
    assert found[0][:cut].std() == pytest.approx(0.02, rel=0.05)
    assert found[0][cut:].std() == pytest.approx(0.5, rel=0.05)
    assert abs(float(found[0][cut:].mean())) < 0.05


def test_what_a_checkpoint_refers_to_is_never_written_over(tmp_path: Path) -> None:
    ours = disk(tmp_path / "store", slots=4)
    kept: list[tuple[Index, list[float], bytes]] = []
    for round_number in range(6):
        train(ours, range(round_number * 4 + 1, round_number * 4 + 5))
        ours.pool.write_back()
        index = Index.of(ours.store.index.tensors())
        kept = [*kept, (index, list(ours.history.rates), weights_of(ours).numpy().tobytes())][-2:]
        ours.store.committed([index for index, _, _ in kept])
    room = ours.store._room
    ours.store.close()
    for index, rates, wanted in kept:
        again = disk(tmp_path / "store", slots=9)
        again.store.go_back(index, [])
        for rate in rates:
            again.history.add(rate)
        assert weights_of(again).numpy().tobytes() == wanted
        assert again.store.damaged() == []
        again.store.close()
    assert room <= store_module._GROW  # places are used again: 24 experts, two checkpoints


def test_one_writes_and_others_read(tmp_path: Path) -> None:
    ours = disk(tmp_path / "store")
    with pytest.raises(RecipeError, match="another process writes these experts"):
        Store.open(tmp_path / "store", options(), write=True)
    Store.open(tmp_path / "store").close()
    ours.store.close()
    Store.open(tmp_path / "store", options(), write=True).close()
    with pytest.raises(RecipeError, match=r"another model \(experts is 12, not 13\)"):
        Store.open(tmp_path / "store", options(experts=13), write=True)
    with pytest.raises(RecipeError, match="holds no experts"):
        Store.open(tmp_path / "nothing")
    (tmp_path / "store" / "store.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"store\.json: damaged"):
        Store.open(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text('{"format": 9}')
    with pytest.raises(CheckpointError, match="is of format 9"):
        Store.open(tmp_path / "store")


def trained(folder: Path) -> tuple[Store, Index]:
    ours = disk(folder, slots=30)
    train(ours, range(1, 12))
    ours.pool.write_back()
    index = Index.of(ours.store.index.tensors())
    ours.store.close()
    store = Store.open(folder)
    store.go_back(index, [])
    return store, index


def test_a_thousand_flipped_bits_are_seen(tmp_path: Path) -> None:
    store, index = trained(tmp_path / "store")
    file, draw, room = tmp_path / "store" / "records.bin", random.Random(1), buffer(store)
    owners = {int(index.place[where]): where for where in zip(*np.nonzero(index.place >= 0), strict=True)}
    good = file.read_bytes()
    with file.open("r+b") as raw:
        for _ in range(1000):
            place = draw.choice(sorted(owners))
            bit = draw.randrange(8 * store.record)
            offset = place * store.record + bit // 8
            raw.seek(offset)
            raw.write(bytes([good[offset] ^ (1 << bit % 8)]))
            raw.flush()
            layer, expert = map(int, owners[place])
            with pytest.raises(CheckpointError, match=rf"expert {expert} of layer {layer} is damaged"):
                store.read(layer, expert, room)
            raw.seek(offset)
            raw.write(good[offset : offset + 1])
            raw.flush()
    assert store.damaged() == []


def test_a_file_that_was_cut_is_seen(tmp_path: Path) -> None:
    store, index = trained(tmp_path / "store")
    last = int(index.place.max())
    os.truncate(tmp_path / "store" / "records.bin", last * store.record + 100)
    (bad,) = store.damaged()
    assert bad[:2] == tuple(int(n) for n in np.argwhere(index.place == last)[0])
    assert "is cut off" in bad[2]


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = disk(tmp_path / "store", slots=4)
    train(ours, range(1, 3))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ours.store._free.clear()
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"another .* of experts cannot be written: .*with --resume"):
        train(ours, range(3, 40))


def test_buffered_files_do_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = disk(tmp_path / "direct", slots=4)
    train(direct, range(1, 10))
    monkeypatch.setenv("MOESAIC_BUFFERED", "1")
    buffered = disk(tmp_path / "buffered", slots=4)
    assert not buffered.store.direct
    train(buffered, range(1, 10))
    assert weights_of(direct).equal(weights_of(buffered))


def test_room_is_given_back(tmp_path: Path) -> None:
    ours = disk(tmp_path / "store", slots=30)
    train(ours, range(1, 12))
    ours.pool.write_back()
    ours.store.committed([Index.of(ours.store.index.tensors())])
    wanted, before = weights_of(ours), ours.store.disk_bytes()
    try:
        given = ours.store.compact()
    except RecipeError as error:
        pytest.skip(str(error))
    assert given > 0
    assert ours.store.disk_bytes() == before - given
    ours.pool.forget()
    assert weights_of(ours).equal(wanted)


PROGRAM = """
import sys
sys.path[:0] = [sys.argv[2]]
from pathlib import Path
from tiny_runs import run_tiny
words = sys.argv[3:]
folder = Path(sys.argv[1])
run_tiny(folder, "run", *words, resume=(folder / "run" / "recipe.toml").exists())
"""
WORDS = [
    *("offload.memory=24KiB", "train.steps=60", "checkpoint.every=3", "train.clip=1.0", "optim.lr=1e-2"),
    *("offload.weights=bf16", "offload.moments=int8", "eval.every=1000"),
]


def test_killed_at_random_instants_it_ends_where_an_undisturbed_run_does(tmp_path: Path) -> None:
    """Twelve kills here; benchmarks/kill_and_resume.py --on-disk makes two hundred."""
    tests, draw, kills = str(Path(__file__).parent), random.Random(3), 0
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "killed"), tests, *WORDS]
    for _ in range(40):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if kills < 12:
            run = tmp_path / "killed" / "run"
            before = (run / "latest").read_text() if (run / "latest").exists() else ""
            deadline = time.monotonic() + 30
            while process.poll() is None and time.monotonic() < deadline:
                if (run / "latest").exists() and (run / "latest").read_text() != before:
                    break
                time.sleep(0.01)
            time.sleep(draw.random() * 0.15)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        _, said = process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, said
    assert process.returncode == 0
    assert kills >= 8
    whole = [sys.executable, "-c", PROGRAM, str(tmp_path / "whole"), tests, *WORDS]
    subprocess.run(whole, check=True, capture_output=True)
    models = [moesaic.load(tmp_path / name / "run") for name in ("killed", "whole")]
    banks = [lm.model.moe_modules() for lm in models]
    for mine, theirs in zip(*banks, strict=True):
        for expert in range(4):
            one, other = (
                m.experts.source.gather(m.experts.layer, [expert], torch.float32) for m in (mine, theirs)
            )
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
    for a, b in zip(models[0].model.parameters(), models[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
