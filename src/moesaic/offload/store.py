"""Experts on disk: a file of records that are never overwritten while anything still refers to them.

A folder holds ``store.json`` (what the records are), ``records.bin`` (sparse) and ``lock``. Which record is
which expert's is said by an ``Index``, and that is part of a checkpoint: the expert's place in the file, its
checksum, the step that it is as of. Written is always to a free place, so a checkpoint commits the dense part
and the experts at once, by one rename, and until then the one before it stays whole. An expert that was never
trained has no record: its weights follow from a generator.

Shape legend: L sparse layers, E experts of a layer.
"""

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import CheckpointError, MoesaicError, RecipeError
from moesaic.files import explain, explained, human_size, sync_directory, write_atomic
from moesaic.model.experts import FFNKind
from moesaic.native.checksum import crc32
from moesaic.offload.origins import Origin, origin_of
from moesaic.offload.records import ExpertShape, Layout

FORMAT = 2  # 1 began untouched experts of another generator
INDEX = "experts.safetensors"  # in a checkpoint
_GROW = 64  # records that room is reserved for at once
_NONE = -1


@dataclass
class Index:
    """Of each expert [L, E]: the place of its record (-1: none), the record's CRC-32, the step it is as of
    (0: never trained), and in how many steps it had a gradient."""

    place: NDArray[np.int64]
    checksum: NDArray[np.int64]
    stamp: NDArray[np.int64]
    steps: NDArray[np.int64]

    @classmethod
    def empty(cls, layers: int, experts: int) -> "Index":
        shape = (layers, experts)
        nothing = (np.zeros(shape, np.int64) for _ in range(3))
        return cls(np.full(shape, _NONE, np.int64), *nothing)

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Index":
        """Out of a checkpoint; a copy."""
        return cls(*(tensors[name].numpy().copy() for name in ("place", "checksum", "stamp", "steps")))

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; copies."""
        return {name: torch.from_numpy(value.copy()) for name, value in vars(self).items()}

    def places(self) -> NDArray[np.int64]:
        """Every place that is in use."""
        return self.place[self.place >= 0]


@dataclass(frozen=True)
class StoreOptions:
    """What a store's records are, and what untouched experts begin as."""

    layout: Layout
    layers: int
    experts: int
    origin: Origin

    def as_json(self) -> dict[str, Any]:
        shape = self.layout.shape
        return {
            "format": FORMAT,
            "layers": self.layers,
            "experts": self.experts,
            "kind": shape.kind,
            "width": shape.width,
            "hidden": shape.hidden,
            "weights": self.layout.weights,
            "moments": self.layout.moments,
            "origin": self.origin.as_json(),
        }

    @classmethod
    def of(cls, value: dict[str, Any]) -> "StoreOptions":
        kind: FFNKind = value["kind"]
        layout = Layout(
            ExpertShape(kind, value["width"], value["hidden"]), value["weights"], value["moments"]
        )
        return cls(layout, value["layers"], value["experts"], origin_of(value["origin"]))


class Store:
    """The records of one run. One process writes; others read what checkpoints refer to."""

    def __init__(
        self, folder: Path, options: StoreOptions, file: int, lock: int | None, direct: bool
    ) -> None:
        self.folder, self.options, self.direct = folder, options, direct
        self._file, self._lock = file, lock
        self.index = Index.empty(options.layers, options.experts)
        self._kept: list[NDArray[np.int64]] = []  # places that checkpoints refer to
        self._fresh: set[int] = set()  # written since the last checkpoint, referred to by the index alone
        self._free: list[int] = []
        self._room = os.fstat(file).st_size // self.record

    @property
    def record(self) -> int:
        """Bytes of one record."""
        return self.options.layout.bytes

    @property
    def layers(self) -> int:
        """Sparse layers."""
        return self.options.layers

    @property
    def experts(self) -> int:
        """Experts of a layer."""
        return self.options.experts

    @classmethod
    def open(cls, folder: Path, options: StoreOptions | None = None, *, write: bool = False) -> "Store":
        """Open a store, or make it where there is none and ``options`` say of what kind.

        Raises RecipeError for a store of other options and where another process writes, CheckpointError for
        one that is damaged or of another version, ResourceError on a full disk.
        """
        about = folder / "store.json"
        made = write and not about.exists()
        if made:
            if options is None:
                raise RecipeError(f"{folder}: holds no experts")
            with explained(folder.parent, f"{folder} cannot be made"):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(about, json.dumps(options.as_json(), indent=1) + "\n")
        found = _read_about(about)
        if options is not None and (odd := _difference(options.as_json(), found.as_json())):
            raise RecipeError(f"{folder}: holds experts of another model ({odd}); choose another out=DIR")
        lock = None
        with explained(folder, f"{folder} cannot be used"), ExitStack() as undo:
            if write:
                lock = _locked(folder)
                undo.callback(os.close, lock)
            try:
                file, direct = _opened(folder / "records.bin", write, make=made)
            except FileNotFoundError:
                raise CheckpointError(
                    f"{folder / 'records.bin'}: is missing; restore it from a copy"
                ) from None
            if write:
                sync_directory(folder)
            undo.pop_all()
        return cls(folder, found, file, lock, direct)

    def close(self) -> None:
        """Give the file and the lock back."""
        os.close(self._file)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # ---- reading ------------------------------------------------------------------------------------

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        """Fill ``into`` with an expert's record, checked. Raises CheckpointError naming the expert."""
        place = int(self.index.place[layer, expert])
        if place == _NONE:
            self._begin(layer, expert, into)
            return
        try:
            read = os.preadv(self._file, [into], place * self.record)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / 'records.bin'}: expert {expert} of layer {layer} cannot be read "
                f"({error.strerror})"
            ) from None
        if read != self.record or crc32(into) != self.index.checksum[layer, expert]:
            what = "is cut off" if read != self.record else "is damaged: its checksum differs"
            mend = "go back to an older checkpoint, or restore the file from a copy"
            if self._lock is None:
                mend = f"open the run anew if it goes on meanwhile, else {mend}"
            raise CheckpointError(
                f"{self.folder / 'records.bin'}: expert {expert} of layer {layer} {what}; {mend}"
            )

    def _begin(self, layer: int, expert: int, into: memoryview) -> None:
        options = self.options
        record = torch.frombuffer(into, dtype=torch.uint8)[None]
        record[:, options.layout.sizes[0] :] = 0  # no moments yet
        options.origin.fill(options.layout.shape, layer, expert, options.layout.weights_of(record)[0])

    # ---- writing ------------------------------------------------------------------------------------

    def place_for(self, layer: int, expert: int) -> int:
        """A place that ``write`` may fill for an expert: that of its record if no checkpoint refers to it,
        else a free one. Raises ResourceError where the disk has no room, before anything is written."""
        place = int(self.index.place[layer, expert])
        if place in self._fresh:
            return place
        if not self._free:
            self._grow()
        place = self._free.pop()
        self._fresh.add(place)
        self.index.place[layer, expert] = place
        return place

    def write(self, layer: int, expert: int, place: int, data: memoryview) -> None:
        """Write an expert's record to its place. Raises ResourceError."""
        try:
            written = os.pwritev(self._file, [data], place * self.record)
        except OSError as error:
            raise self._failed(error) from None
        if written != self.record:
            raise self._failed(OSError(errno.ENOSPC, "no space"))
        self.index.checksum[layer, expert] = crc32(data)

    def _grow(self) -> None:
        """Reserve room for more records: a write into a hole could fail half-way through a step."""
        start = self._room * self.record
        try:
            os.posix_fallocate(self._file, start, _GROW * self.record)
        except OSError as error:
            raise self._failed(error) from None
        self._free.extend(range(self._room + _GROW - 1, self._room - 1, -1))
        self._room += _GROW

    def _failed(self, error: OSError) -> MoesaicError:
        return explain(
            error,
            self.folder,
            f"another {human_size(_GROW * self.record)} of experts cannot be written",
            "the last checkpoint is whole, go on from it with --resume",
        )

    def flush(self) -> None:
        """Have everything written be on the disk, not on its way there. Raises ResourceError."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from None

    # ---- checkpoints --------------------------------------------------------------------------------

    def committed(self, kept: Iterable[Index]) -> None:
        """Say which checkpoints are kept, the newest of which is as the index is now: all places that none of
        them refers to are free."""
        self._kept = [index.places() for index in kept]
        self._fresh.clear()
        self._set_free()

    def go_back(self, index: Index, kept: Iterable[Index]) -> int:
        """Be as a checkpoint was; how many experts lose what was written after it."""
        lost = len(self._fresh)
        self.index = Index(*(value.copy() for value in vars(index).values()))
        self.committed([*kept, index])
        return lost

    def _set_free(self) -> None:
        used = np.unique(np.concatenate([self.index.places(), *self._kept]))
        free = np.setdiff1d(np.arange(self._room), used, assume_unique=True)
        self._free = free[::-1].tolist()  # the lowest first

    def damaged(self, passed: set[tuple[int, int]] | None = None) -> list[tuple[int, int, str]]:
        """Every expert of the index whose record is not sound: layer, expert and why. Places and checksums
        that ``passed`` holds are not read again; what is read joins them."""
        passed = set() if passed is None else passed
        buffer = np.empty(self.record + 4096, np.uint8)
        start = -buffer.ctypes.data % 4096
        view = memoryview(buffer)[start : start + self.record]  # type: ignore[arg-type]
        bad = []
        for layer, expert in zip(*np.nonzero(self.index.place >= 0), strict=True):
            what = int(self.index.place[layer, expert]), int(self.index.checksum[layer, expert])
            if what in passed:
                continue
            passed.add(what)
            try:
                self.read(int(layer), int(expert), view)
            except CheckpointError as error:
                bad.append((int(layer), int(expert), str(error)))
        return bad

    def compact(self) -> int:
        """Give the disk back what free places take; bytes. Raises RecipeError where the file system
        cannot."""
        before = os.fstat(self._file).st_blocks
        for place in self._free:
            _punch(self._file, place * self.record, self.record)
        return (before - os.fstat(self._file).st_blocks) * 512

    def free_places(self) -> int:
        """Places that nothing refers to."""
        return len(self._free)

    def disk_bytes(self) -> int:
        """What the records take on disk; holes take nothing."""
        return os.fstat(self._file).st_blocks * 512


def _read_about(about: Path) -> StoreOptions:
    try:
        value = json.loads(about.read_bytes())
        if value["format"] != FORMAT:
            raise CheckpointError(f"{about}: is of format {value['format']}; this version reads {FORMAT}")
        return StoreOptions.of(value)
    except FileNotFoundError:
        raise RecipeError(f"{about.parent}: holds no experts (no store.json)") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{about}: damaged ({error})") from None


def _locked(folder: Path) -> int:
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RecipeError(f"{folder}: another process writes these experts; wait for it to end") from None
    return lock


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """What of a store's options differs, in words; nothing if they are the same."""
    odd = next((key for key in mine if mine[key] != theirs[key]), None)
    if odd is None:
        return ""
    if odd == "origin":
        return (
            _difference(mine[odd], theirs[odd])
            if mine[odd].keys() == theirs[odd].keys()
            else "begun otherwise"
        )
    return f"{odd} is {theirs[odd]}, not {mine[odd]}" if len(str(mine[odd])) < 100 else f"other {odd}"


def _opened(path: Path, write: bool, make: bool) -> tuple[int, bool]:
    """The file, and whether it is read and written past the page cache, which would hold once more what the
    slots hold; some file systems refuse that."""
    flags = (os.O_RDWR if write else os.O_RDONLY) | (os.O_CREAT if make else 0) | os.O_CLOEXEC
    direct = getattr(os, "O_DIRECT", 0)
    if direct and not os.environ.get("MOESAIC_BUFFERED"):
        try:
            return os.open(path, flags | direct, 0o644), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, flags, 0o644), False


def _punch(file: int, start: int, length: int) -> None:
    """Make a hole (Linux's fallocate with FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(file, 3, ctypes.c_long(start), ctypes.c_long(length))
    if result != 0:
        code = ctypes.get_errno()
        raise RecipeError(f"this file system cannot give room back ({os.strerror(code)})")
