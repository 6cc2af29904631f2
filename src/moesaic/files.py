"""Files written so that a crash leaves the old content or the new, and locks that die with their owner."""

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from moesaic.errors import MoesaicError, RecipeError, ResourceError

BLOCK_BYTES = 4 * 2**20

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}


def write_new(path: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Create ``path`` from ``blocks`` (memoryviews of bytes) and fsync it; it must not exist yet.

    Returns its length in bytes and its SHA-256 in hex, both taken while writing. Raises OSError.
    """
    digest, length = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for block in blocks:
            view = memoryview(block)
            while len(view):
                written = os.write(descriptor, view[:BLOCK_BYTES])
                digest.update(view[:written])
                length += written
                view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return length, digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace ``path`` by ``data`` (text as UTF-8): after a crash it holds the old bytes or the new.

    Raises ResourceError when the disk is full, RecipeError when the directory cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with explained(path.parent, f"{path} cannot be written"):
        try:
            temporary.unlink(missing_ok=True)
            write_new(temporary, [data.encode() if isinstance(data, str) else data])
            os.replace(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable: without it a rename can be lost with the power. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunLock:
    """The right to write in a run directory, held from construction to ``release``, ``with`` or death.

    The kernel drops it with the process, however that ends. Forked children share it while they live.
    Raises RecipeError when another process (or another lock of this one) holds it.
    """

    def __init__(self, run: Path) -> None:
        path = run / ".lock"
        with explained(run, f"{run} cannot be locked"):
            run.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o666)
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
            except BlockingIOError:
                holder = os.pread(self._descriptor, 32, 0).strip()
                self._close()
                by = f"process {int(holder)}" if holder.isdigit() else "another process"
                raise RecipeError(
                    f"{run} is in use by {by}; wait for it, stop it, or choose another directory"
                ) from None
            except BaseException:
                self._close()
                raise

    def release(self) -> None:
        """Let go of the directory; a second call does nothing."""
        if self._descriptor >= 0:
            # Closing alone would leave the lock with forked children that still hold the file open.
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def explained(directory: Path, problem: str, advice: str = "") -> Iterator[None]:
    """Turn an OSError inside the block into the sentence of ``explain``."""
    try:
        yield
    except OSError as error:
        raise explain(error, directory, problem, advice) from error


def explain(error: OSError, directory: Path, problem: str, advice: str = "") -> MoesaicError:
    """What a failed write in ``directory`` means for the user, as an exception to raise.

    ``problem`` opens the sentence ("checkpoint needs 1.2 GB"); ``advice``, if any, closes it.
    """
    end = f"; {advice}" if advice else ""
    if error.errno in _FULL:
        why = {errno.EDQUOT: " but your quota is used up", errno.EFBIG: " but files may not grow so large"}
        return ResourceError(
            f"{problem}: {directory} has {human_size(free_bytes(directory))} free"
            f"{why.get(error.errno, '')}; make room or choose another directory{end}"
        )
    reason = error.strerror or str(error)
    if error.errno in _REFUSED:
        return RecipeError(f"{problem}: {directory}: {reason}; choose a directory that can be written{end}")
    return ResourceError(f"{problem}: writing in {directory} failed: {reason}{end}")


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write where ``directory`` is, or would be made."""
    existing = next((place for place in (directory, *directory.parents) if place.is_dir()), Path("/"))
    return shutil.disk_usage(existing).free


def human_size(count: float) -> str:
    """A number of bytes as people read it, in powers of 1,000: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
