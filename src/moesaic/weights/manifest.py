"""The manifest of a checkpoint: which files it has, of what size and with what checksum.

A directory is believed only if ``manifest.json`` holds exactly the bytes that were written and the
other files are exactly those it lists, byte for byte. So any single flipped bit, a lost or foreign
file and two files exchanged are all found. The model card alone is left out: people edit it.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import CheckpointError
from moesaic.files import BLOCK_BYTES, write_new

MANIFEST, CARD = "manifest.json", "README.md"
FORMAT = 1

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file; ``kind`` is tensors, json or bytes."""

    kind: str
    size: int
    sha256: str


def verify(directory: Path) -> None:
    """Read every byte of a checkpoint; raises CheckpointError naming the file and what is wrong."""
    entries = listed(directory)
    for name, entry in entries.items():
        read_checked(directory / name, entry, keep=False)


def is_valid(directory: Path) -> bool:
    """Whether ``verify`` finds nothing wrong; reads every byte."""
    try:
        verify(directory)
    except CheckpointError:
        return False
    return True


def is_plain(name: str) -> bool:
    """Whether ``name`` may be a file of a checkpoint: no separators, not hidden, not the manifest."""
    return bool(_PLAIN_NAME.fullmatch(name)) and name != MANIFEST


def write_manifest(directory: Path, entries: Mapping[str, Entry]) -> None:
    """Write the manifest of ``entries``; to be the last file. Raises OSError."""
    files = {
        name: {"bytes": entry.size, "kind": entry.kind, "sha256": entry.sha256}
        for name, entry in entries.items()
        if name != CARD
    }
    body = {"format": FORMAT, "files": files}
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    write_new(directory / MANIFEST, [_canonical({**body, "digest": digest})])


def listed(directory: Path) -> dict[str, Entry]:
    """The entries of the manifest, which the files present match by name; their bytes are not read.

    Raises CheckpointError naming the file that is missing, foreign or, the manifest, damaged.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a directory; give the directory of a checkpoint")
    entries = _read_manifest(directory / MANIFEST)
    try:
        present = set(os.listdir(directory))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror}") from None
    for name in sorted(entries.keys() - present):
        raise CheckpointError(f"{directory / name}: is missing")
    for name in sorted(present - entries.keys() - {MANIFEST, CARD}):
        raise CheckpointError(
            f"{directory / name}: is not listed in {MANIFEST}; move it out of the checkpoint"
        )
    return entries


def recorded(directory: Path) -> dict[str, Entry]:
    """What an export's manifest says of its files, to which others may have added theirs; nothing where
    there is no manifest. Raises CheckpointError for a damaged one."""
    path = (directory / MANIFEST).resolve()  # a Hugging Face cache links to its files
    if not path.exists():
        return {}
    written = read_checked(path, None, keep=True)
    if b'"digest"' not in written and b'"sha256"' not in written:
        return {}  # another tool's file of that name
    return _read_manifest(path)


def _read_manifest(path: Path) -> dict[str, Entry]:
    data = read_checked(path, None, keep=True)
    try:
        table = json.loads(data)
        canonical = _canonical(table)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not the JSON that was written") from None
    if not isinstance(table, dict) or canonical != data:
        raise CheckpointError(f"{path}: does not hold the bytes that were written")
    if table.pop("digest", None) != hashlib.sha256(_canonical(table)).hexdigest():
        raise CheckpointError(f"{path}: content does not match its own checksum")
    if table.get("format") != FORMAT:
        written = table.get("format")
        raise CheckpointError(f"{path}: format {written!r} is not {FORMAT}; use the moesaic that wrote it")
    return _parse_entries(path, table.get("files"))


def read_checked(path: Path, entry: Entry | None, keep: bool) -> bytes:
    """Stream a regular file past its checksum; returns its bytes if ``keep``, else none of them.

    Without an ``entry`` nothing is compared. Raises CheckpointError naming the file.
    """
    digest, size, kept = hashlib.sha256(), 0, bytearray()
    try:
        # Without O_NONBLOCK a pipe of this name would be waited for without end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: is not a regular file")
            if entry and status.st_size != entry.size:
                state = "truncated" if status.st_size < entry.size else "too long"
                raise CheckpointError(f"{path}: {state} ({status.st_size} bytes instead of {entry.size})")
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                if keep:
                    kept += block
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be read: {error.strerror}"
        raise CheckpointError(f"{path}: {reason}") from None
    if entry and (size, digest.hexdigest()) != (entry.size, entry.sha256):
        raise CheckpointError(f"{path}: content does not match its checksum")
    return bytes(kept)


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _parse_entries(path: Path, files: Any) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, line in files.items() if isinstance(files, dict) else [("files", None)]:
        match line:
            case {"bytes": int(size), "kind": "tensors" | "json" | "bytes" as kind, "sha256": str(sha256)}:
                entries[name] = Entry(kind, size, sha256)
            case _:
                raise CheckpointError(f"{path}: the entry {name!r} is not one of a file")
        if not is_plain(name):
            raise CheckpointError(f"{path}: {name!r} is not a plain file name")
    return entries
