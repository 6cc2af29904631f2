"""A directory of safetensors files as others write it: one file, or shards with an index.

It comes from strangers, so nothing in it is believed: names of shards must be plain files inside the
directory, every header is checked against the length of its file before a byte of a tensor is read, and JSON
that says a key twice is refused. Tensors are read one at a time, and not mapped: the pages of nine mapped
models stay resident while there is room (2.4 GB in a merge of eight of SmolLM2-135M's shape), and a file that
is cut while it is mapped is a bus error.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.weights.manifest import Entry, read_checked, recorded

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # bytes, as the safetensors library
_JSON_LIMIT = 64 * 2**20
_MOST_DIMENSIONS, _MOST_DIGITS = 8, 20
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it is; ``dtype`` is one of floating point, ``start`` its first byte in the
    file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Shards:
    """All tensors of a directory, their headers checked and no data read yet."""

    def __init__(self, directory: Path, ignore: Iterable[str] = (), file: str = SINGLE) -> None:
        """``ignore``: endings of tensor names that are passed over; ``file``: the name of the one file where
        there are no shards. Raises CheckpointError."""
        self.directory = directory
        entries = recorded(directory)
        self._ignore = tuple(ignore)
        self.tensors: dict[str, Stored] = {}
        if os.path.lexists(directory / file):
            self._add(file, entries)
        elif os.path.lexists(directory / INDEX):
            promised = self._read_index(entries)
            for name in sorted(set(promised.values())):
                self._add(name, entries)
            for tensor, name in promised.items():
                if not self._ignored(tensor) and self._file_of(tensor) != directory / name:
                    raise CheckpointError(
                        f"{directory / name}: has no tensor {shown(tensor)}, which {INDEX} promises"
                    )
        else:
            raise CheckpointError(f"{directory}: has neither {file} nor {INDEX}{_hint(directory)}")

    def read(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        try:
            with stored.file.open("rb", buffering=0) as file:
                file.seek(stored.start)
                left = memoryview(tensor.flatten().view(torch.uint8).numpy().data)
                while left:  # one read gives at most 2 GB
                    count = file.readinto(left)
                    if not count:
                        raise CheckpointError(f"{stored.file}: truncated while it was read")
                    left = left[count:]
        except OSError as error:
            raise CheckpointError(f"{stored.file}: {shown(name)} cannot be read: {error.strerror}") from None
        return tensor

    def _ignored(self, tensor: str) -> bool:
        return bool(self._ignore) and tensor.endswith(self._ignore)

    def _file_of(self, tensor: str) -> Path | None:
        return self.tensors[tensor].file if tensor in self.tensors else None

    def _read_index(self, entries: dict[str, Entry]) -> dict[str, str]:
        path = self.directory / INDEX
        table = read_json_file(path, entries.get(INDEX))
        promised = table.get("weight_map") if isinstance(table, dict) else None
        if not isinstance(promised, dict) or not promised:
            raise CheckpointError(f"{path}: has no weight_map, the table of tensors and their files")
        for tensor, name in promised.items():
            plain = (
                isinstance(name, str)
                and name == os.path.basename(name)
                and "\\" not in name
                and "\0" not in name
            )
            if not plain or not name.endswith(".safetensors") or name.startswith("."):
                raise CheckpointError(
                    f"{path}: {tensor} is in {name!r}, which is no plain name of a safetensors file"
                )
        return promised

    def _add(self, name: str, entries: dict[str, Entry]) -> None:
        path = self.directory / name
        real = real_file(path)
        header = _read_header(path, real)
        entry = entries.get(name) or _cache_entry(real)
        if entry is not None:
            read_checked(real, entry, keep=False)
        for tensor, stored in header.items():
            if tensor in self.tensors:
                raise CheckpointError(f"{path}: {shown(tensor)} is also in {self.tensors[tensor].file.name}")
            if not self._ignored(tensor):
                self.tensors[tensor] = stored


def read_json_file(path: Path, entry: Entry | None = None) -> Any:
    """A JSON file of a stranger: no key twice, no NaN, of bounded size. Raises CheckpointError naming it."""
    real = real_file(path)
    if (size := real.stat().st_size) > _JSON_LIMIT:
        raise CheckpointError(f"{path}: is {size} bytes long, which no such file is")
    return _parse(read_checked(real, entry, keep=True), path)


def real_file(path: Path) -> Path:
    """The regular file that ``path`` is, in its own directory, or in the blobs of a Hugging Face cache, which
    links to them from beside its ``snapshots``. Raises CheckpointError for anything else."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
        home = path.parent.resolve()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing") from None
    except (OSError, ValueError, RuntimeError) as error:  # a name no file can have, a loop of links
        reason = error.strerror if isinstance(error, OSError) else "is no file"
        raise CheckpointError(f"{shown(str(path))}: {reason}") from None
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file")
    if real.parent not in (home, blobs):
        raise CheckpointError(f"{path}: is a link out of its directory; copy the file there")
    return real


def shown(name: str) -> str:
    """A stranger's name as a message may hold it: no control character reaches a terminal."""
    return name if name.isprintable() else ascii(name)


def _hint(directory: Path) -> str:
    try:
        others = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
    except OSError as error:
        return f" that can be seen: {error.strerror}"
    return f"; {shown(others[0])} is not read: convert it to safetensors" if others else ""


def _read_header(path: Path, real: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, each inside it, none over another, nothing between them."""
    size = real.stat().st_size
    try:
        with real.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(f"{path}: truncated, or not a safetensors file")
            table = _parse(file.read(length), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: its header is not a table")
    found, spans = {}, []
    for name, line in table.items():
        if name == "__metadata__":
            continue
        match line:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(end)]} if (
                len(shape) <= _MOST_DIMENSIONS
                and all(type(n) is int and 0 <= n < 2**40 for n in shape)
                and type(start) is type(end) is int
            ):
                spans.append((start, end))
            case _:
                raise CheckpointError(f"{path}: the header's entry {name!r} is not one of a tensor")
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{path}: {shown(name)} is {shown(dtype)}: quantised and integer weights are not read; use "
                "the model in float32, bfloat16 or float16"
            )
        if end - start != prod(shape) * _DTYPES[dtype]:
            raise CheckpointError(
                f"{path}: {shown(name)} has {end - start} bytes where {dtype} {shape} has others"
            )
        found[name] = Stored(path, tuple(shape), _TORCH[dtype], 8 + length + start)
    here = 0
    for start, end in sorted(spans):
        if start != here:
            raise CheckpointError(f"{path}: its tensors overlap or leave a gap at byte {here} of the data")
        here = end
    if 8 + length + here != size:
        state = "truncated" if 8 + length + here > size else "too long"
        raise CheckpointError(f"{path}: {state} ({size} bytes instead of {8 + length + here})")
    return found


def _cache_entry(blob: Path) -> Entry | None:
    """Hugging Face's cache names a large file by its SHA-256; other files have none to compare with."""
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return None
    return Entry("tensors", blob.stat().st_size, blob.name)


def _parse(data: bytes, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{path}: says {twice!r} twice")
        return table

    def whole(text: str) -> int:
        if len(text) > _MOST_DIGITS:
            raise CheckpointError(f"{path}: holds a number of {len(text)} digits")
        return int(text)

    def refuse(constant: str) -> Any:
        raise CheckpointError(f"{path}: holds {constant}, which is no JSON")

    try:
        return json.loads(data, object_pairs_hook=once, parse_int=whole, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: is not JSON, or damaged") from None
