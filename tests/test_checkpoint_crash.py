"""A kill, a failing call or a full disk at any moment leaves a checkpoint that is whole."""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import listing, simple, unspoken, value_in

from moesaic import files
from moesaic.errors import CheckpointError, MoesaicError, RecipeError, ResourceError
from moesaic.weights import checkpoint
from moesaic.weights.checkpoint import newest_valid, save
from moesaic.weights.contents import Contents
from moesaic.weights.manifest import is_valid

CHANGING_CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def fail_at(patch: Callable[[Any, str, Any], None], count: int, fail: Callable[..., None]) -> None:
    """Make the ``count``-th of the calls that change a disk call ``fail`` with its name and arguments."""
    calls = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count:
                fail(name, *args)
            return real(*args, **kwargs)

        return wrapped

    for name in CHANGING_CALLS:
        patch(os, name, wrap(name, getattr(os, name)))


def save_and_die(run: Path, step: int, value: int, count: int) -> bool:
    """Save in a child that dies at its ``count``-th call (of a write, half is done); whether it lived."""
    real_write = os.write

    def die(name: str, *args: Any) -> None:
        if name == "write":
            real_write(args[0], args[1][: len(args[1]) // 2])
        os._exit(9)

    child = os.fork()
    if child == 0:
        try:
            fail_at(setattr, count, die)
            save(run, step, simple(value), keep=2)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


@pytest.mark.parametrize(
    ("before", "step", "allowed"),
    [
        ([], 100, {None, 7}),
        ([100, 200], 300, {200, 7}),  # prunes one
        ([100], 100, {100, 7}),  # replaces the only one
        ([100, 200], 200, {200, 7}),
    ],
)
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(
    tmp_path: Path, before: list[int], step: int, allowed: set[int | None]
) -> None:
    seen = set()
    base = tmp_path / "base"
    base.mkdir()
    for earlier in before:
        save(base, earlier, simple(earlier), keep=2)
    for count in range(1, 1000):
        run = tmp_path / f"run{count}"
        shutil.copytree(base, run)
        finished = save_and_die(run, step, 7, count)
        path = newest_valid(run, unspoken)
        value = None if path is None else value_in(path)
        seen.add(value)
        place = run / "checkpoints"
        assert all(is_valid(path) for path in place.glob("step-*")), (
            "half a checkpoint has a whole one's name"
        )
        latest = run / "latest"
        assert not latest.exists() or latest.read_text() in {f"step-{n:08d}\n" for n in (*before, step)}
        # The next writer finishes what the dead one left, and still has the same one to go back to.
        save(run, 900, simple(900), keep=2)
        kept = listing(run)
        assert kept[-1] == "step-00000900"
        assert len(kept) == (1 if path is None else 2)
        assert path is None or value_in(place / kept[0]) == value
        shutil.rmtree(run)
        if finished:
            break
    assert count > 20
    assert finished
    assert seen == allowed


def attempt(run: Path, step: int, value: int) -> MoesaicError | None:
    try:
        save(run, step, simple(value), keep=2)
    except MoesaicError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, ResourceError),
        (errno.EDQUOT, ResourceError),
        (errno.EIO, ResourceError),
        (errno.EROFS, RecipeError),
        (errno.EACCES, RecipeError),
    ],
)
def test_an_error_at_any_call_is_a_sentence_and_leaves_no_rubbish(
    tmp_path: Path, number: int, kind: type[MoesaicError]
) -> None:
    base = tmp_path / "base"
    for step in (100, 200):
        save(base, step, simple(step), keep=2)
    for count in range(1, 1000):
        run = tmp_path / f"run{count}"
        shutil.copytree(base, run)
        failed: list[str] = []

        def fail(name: str, *_: Any, failed: list[str] = failed) -> None:
            failed.append(name)
            raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch.setattr, count, fail)
            error = attempt(run, 200, 7)
        # A file that cannot be opened to be read back is damage, whatever the reason.
        assert error is None or isinstance(error, kind | CheckpointError)
        assert error is None or str(run) in str(error)
        path = newest_valid(run, unspoken)
        assert path is not None
        assert value_in(path) in (200, 7)
        if failed and failed[0] not in ("unlink", "rmdir", "open"):
            assert not [name for name in listing(run) if ".tmp-" in name]
        shutil.rmtree(run)
        if not failed:
            break
    assert count > 20
    assert not failed


def test_all_is_durable_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose what was not synced, so the order of syncs and renames is the contract."""
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def short(path: str | Path) -> str:
        return str(path).replace(str(tmp_path), "run").replace(f"-{os.getpid()}", "-pid")

    def noted_fsync(descriptor: int) -> None:
        events.append(("sync", short(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def noted_rename(old: Path, new: Path) -> None:
        events.append(("name", short(new)))
        rename(old, new)

    def noted_replace(old: Path, new: Path) -> None:
        events.append(("name", short(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(tmp_path, 100, simple(1), keep=2)
    temporary = "run/checkpoints/.step-00000100.tmp-pid"
    assert events == [
        ("sync", "run"),
        ("sync", f"{temporary}/model.safetensors"),
        ("sync", f"{temporary}/state.json"),
        ("sync", f"{temporary}/tokenizer.json"),
        ("sync", f"{temporary}/manifest.json"),
        ("sync", temporary),
        ("name", "run/checkpoints/step-00000100"),
        ("sync", "run/checkpoints"),
        ("sync", "run/.latest.tmp-pid"),
        ("name", "run/latest"),
        ("sync", "run"),
    ]
    events.clear()
    save(tmp_path, 100, simple(2), keep=2)
    assert events[5:9] == [
        ("sync", temporary),
        ("name", "run/checkpoints/.step-00000100.old-pid"),
        ("name", "run/checkpoints/step-00000100"),
        ("sync", "run/checkpoints"),
    ]


def test_a_disk_that_lies_is_found_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 100, simple(1), keep=2)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(len(data))))
    with pytest.raises(CheckpointError, match="does not give back what was written"):
        save(tmp_path, 100, simple(2), keep=2)
    monkeypatch.undo()
    assert listing(tmp_path) == ["step-00000100"]
    assert value_in(tmp_path / "checkpoints" / "step-00000100") == 1


def test_something_else_in_the_way_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    (place / "step-00000100").write_text("mine")
    with pytest.raises(RecipeError, match="step-00000100: is in the way"):
        save(tmp_path, 100, simple(1), keep=2)
    assert listing(tmp_path) == ["step-00000100"]
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="choose a directory that can be written"):
        save(tmp_path / "file", 100, simple(1), keep=2)


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"needs \S+ kB, .* has 10\.0 kB free; there is no earlier"):
        save(tmp_path, 100, simple(1), keep=2)
    monkeypatch.undo()
    save(tmp_path, 100, simple(1), keep=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"the last good checkpoint is .*step-00000100$"):
        save(tmp_path, 200, simple(2), keep=2)
    assert listing(tmp_path) == ["step-00000100"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True).returncode
    ):
        pytest.skip("a small disk can be mounted only by a root that may mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(small_disk, 100, simple(1), keep=2)
    large = Contents(tensors={"model.safetensors": {"w": torch.zeros(100_000)}})
    with pytest.raises(ResourceError, match=r"checkpoint needs 4\d\d\.\d kB, "):
        save(small_disk, 200, large, keep=2)
    # Others may fill the disk after the space was asked for.
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 2**40)
    with pytest.raises(
        ResourceError, match=r"checkpoint needs 4\d\d\.\d kB: .*; the last good checkpoint is"
    ):
        save(small_disk, 200, large, keep=2)
    assert listing(small_disk) == ["step-00000100"]
    assert files.free_bytes(small_disk) > 150_000
    path = newest_valid(small_disk, unspoken)
    assert path is not None
    assert value_in(path) == 1


def test_a_read_only_disk(small_disk: Path) -> None:
    save(small_disk, 100, simple(1), keep=2)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RecipeError, match=r"disk/checkpoints: Read-only file system; choose a directory"):
        save(small_disk, 200, simple(2), keep=2)
    path = newest_valid(small_disk, unspoken)
    assert path is not None
    assert value_in(path) == 1
