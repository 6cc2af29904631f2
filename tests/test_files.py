"""Atomic files, sentences about full disks, and the lock of a run directory."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic import files
from moesaic.errors import RecipeError, ResourceError
from moesaic.files import RunLock, explain, human_size, write_atomic

HOLD = "import sys, pathlib; from moesaic.files import RunLock; lock = RunLock(pathlib.Path(sys.argv[1]))"


def test_write_atomic_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_atomic(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    assert os.listdir(tmp_path) == ["latest"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
def test_write_atomic_keeps_the_old_content_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "latest"
    write_atomic(path, "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(ResourceError, match="latest cannot be written"):
        write_atomic(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["latest"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    write_atomic(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_failures_are_sorted_by_what_the_user_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda _: 300_000_000)
    full = explain(OSError(errno.ENOSPC, "x"), tmp_path, "checkpoint needs 1.2 GB", "the end")
    assert isinstance(full, ResourceError)
    assert str(full) == (
        f"checkpoint needs 1.2 GB: {tmp_path} has 300.0 MB free; "
        "make room or choose another directory; the end"
    )
    assert "quota" in str(explain(OSError(errno.EDQUOT, "x"), tmp_path, "p"))
    for number in (errno.EROFS, errno.EACCES):
        refused = explain(OSError(number, "refused"), tmp_path, "p")
        assert isinstance(refused, RecipeError)
        assert str(refused) == f"p: {tmp_path}: refused; choose a directory that can be written"
    assert isinstance(explain(OSError(errno.EIO, "bad"), tmp_path, "p"), ResourceError)


def test_sizes_are_readable() -> None:
    assert [human_size(n) for n in (0, 999, 1000, 1_234_567, 1.2e9, 999_960, 5e15)] == [
        "0 bytes",
        "999 bytes",
        "1.0 kB",
        "1.2 MB",
        "1.2 GB",
        "1.0 MB",
        "5000.0 TB",
    ]


def test_a_second_process_is_refused_until_the_first_dies(tmp_path: Path) -> None:
    wait = HOLD + "; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", wait, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RecipeError, match=f"is in use by process {holder.pid};"):
            RunLock(tmp_path)
        holder.kill()
    with RunLock(tmp_path):
        other = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert other.returncode == 1
        assert f"is in use by process {os.getpid()};" in other.stderr


def test_a_lock_is_released_once_and_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "run")
    with pytest.raises(RecipeError, match="is in use"):
        RunLock(tmp_path / "new" / "run")
    lock.release()
    lock.release()
    RunLock(tmp_path / "new" / "run").release()


def test_a_lock_needs_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="file cannot be locked"):
        RunLock(tmp_path / "file")
