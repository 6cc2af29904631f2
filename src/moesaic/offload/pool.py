"""Slots in memory for the experts in use; the others are on disk.

Who is used least often leaves first. Reads and writes run in threads; what will be needed is asked for before
it is. All bookkeeping is done by the caller's thread, so nothing here needs a lock.

Shape legend: S slots.
"""

import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from moesaic.errors import CheckpointError, RecipeError, ResourceError
from moesaic.files import human_size
from moesaic.native.threads import compute_alone

Key = tuple[int, int]  # layer, expert
_FADE = 0.5  # a count is halved after every step of as many uses as there are slots
FREE: Key = (-1, -1)


class Records(Protocol):
    """What a pool holds some of: records of ``record`` bytes of ``experts`` in each of ``layers``."""

    @property
    def record(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def experts(self) -> int: ...
    def read(self, layer: int, expert: int, into: memoryview) -> None: ...
    def place_for(self, layer: int, expert: int) -> int: ...
    def write(self, layer: int, expert: int, place: int, data: memoryview) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def check_memory(memory: int, record: int) -> None:
    """Raise RecipeError for less memory than two records of so many bytes take."""
    if memory // record < 2:
        raise RecipeError(
            f"offload.memory: {human_size(memory)} hold {memory // record} experts of {human_size(record)}; "
            f"give {2 * record:,} bytes or more"
        )


class Pool:
    """As many records of ``store`` as ``memory`` bytes hold."""

    def __init__(self, store: Records, memory: int, threads: int = 8) -> None:
        """Raises as ``check_memory``, and ResourceError where the system has not so much."""
        check_memory(memory, store.record)
        self.store, self.slots = store, min(memory // store.record, store.layers * store.experts)
        try:  # aligned to pages, as direct I/O asks for
            self._memory = mmap.mmap(-1, self.slots * store.record)
        except OSError as error:
            raise ResourceError(
                f"offload.memory: the system gives no {human_size(self.slots * store.record)} "
                f"({error.strerror}); give less"
            ) from None
        self.records = torch.frombuffer(self._memory, dtype=torch.uint8).view(self.slots, store.record)
        self._view = memoryview(self._memory)
        self._slot: dict[Key, int] = {}
        self._key: list[Key] = [FREE] * self.slots
        self._uses_S = np.zeros(self.slots)
        self._last_S = np.zeros(self.slots, np.int64)
        self._dirty_S = np.zeros(self.slots, bool)
        self._busy_S = np.zeros(self.slots, bool)  # in use by what is being computed, or being filled
        self._clock = self._since_fade = 0
        self._threads = ThreadPoolExecutor(threads, "experts", initializer=compute_alone)
        self._filling: dict[int, Future[None]] = {}
        self._writing: dict[Key, Future[None]] = {}  # by who is being written
        self._ahead: dict[int, Future[None]] = {}  # slots that are written while they are still held
        self._left = 0  # slots since ``write_ahead`` was last called
        self.reads = self.writes = self.hits = 0  # records; hits: those that were here already

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The slots of these experts, filled; they stay until ``release``. Raises as Store.read and write,
        and RecipeError where there are more than slots."""
        slots = self._reserve(layer, experts)
        try:
            for slot in slots:
                self._finish(slot)
                self._end_ahead(slot)
        except BaseException:
            self.release(slots)
            raise
        return slots

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read these experts, as many as there is room for."""
        room = self.slots - int(self._busy_S.sum())
        missing = [e for e in experts if (layer, e) not in self._slot][: max(0, room)]
        if missing:
            self.release(self._reserve(layer, missing))

    def release(self, slots: Sequence[int]) -> None:
        """Let these slots be taken by others again."""
        self._busy_S[list(slots)] = False

    def change(self, slots: Sequence[int]) -> None:
        """Say that what these slots hold was changed: it is written before they are taken."""
        self._dirty_S[list(slots)] = True

    def write_ahead(self) -> None:
        """Begin to write what will leave next and was changed, as much as has left since the last call, so
        that reading into its slots need not wait for it. Raises ResourceError."""
        leaving = min(self._left, self.slots - int(self._busy_S.sum()))
        self._left = 0
        for slot in self._victims(leaving, []):
            if self._dirty_S[slot]:
                self._end_ahead(slot)
                self._dirty_S[slot] = False
                self._ahead[slot] = self._threads.submit(self.store.write, *self._to_write(slot))
                self.writes += 1

    @property
    def memory(self) -> int:
        """Bytes of all slots."""
        return self.slots * self.store.record

    def close(self) -> None:
        """End the threads, close the records, and free the slots; nothing is written back."""
        self._threads.shutdown()
        self.store.close()
        del self.records, self._view, self._memory  # whoever is part of a cycle is collected late

    def _reserve(self, layer: int, experts: Sequence[int]) -> list[int]:
        known = [self._slot.get((layer, expert)) for expert in experts]
        here = [slot for slot in known if slot is not None]
        missing = [n for n, slot in enumerate(known) if slot is None]
        victims = self._victims(len(missing), here)
        self.hits += len(here)
        self._busy_S[here] = True
        slots = [-1 if slot is None else slot for slot in known]
        try:
            for n, slot in zip(missing, victims, strict=True):
                slots[n] = slot
                self._replace(slot, (layer, experts[n]))
        except BaseException:
            self.release([slot for slot in slots if slot >= 0])
            raise
        self._clock += 1
        self._uses_S[slots] += 1
        self._last_S[slots] = self._clock
        self._since_fade += len(slots)
        if self._since_fade > self.slots:
            self._uses_S *= _FADE
            self._since_fade = 0
        return slots

    def _victims(self, count: int, spared: list[int]) -> list[int]:
        """The slots to give up: those used least, and of these the longest ago."""
        if not count:
            return []
        busy_S = self._busy_S.copy()
        busy_S[spared] = True
        free = np.flatnonzero(~busy_S)
        if len(free) < count:
            raise RecipeError(
                f"offload.memory: {self.slots} experts of {human_size(self.store.record)} fit, but one step "
                f"of the computation needs {self.slots - len(free) + count} at once; give "
                f"{human_size((self.slots - len(free) + count) * self.store.record)} or more"
            )
        order = np.lexsort((self._last_S[free], self._uses_S[free]))
        return [int(slot) for slot in free[order[:count]]]

    def _replace(self, slot: int, key: Key) -> None:
        """Begin to write what a slot holds, if that was changed, and then to read another expert into it."""
        with suppress(CheckpointError):  # that of an expert which nobody wants any more
            self._finish(slot)
        self._end_ahead(slot)
        old, dirty = self._key[slot], bool(self._dirty_S[slot])
        job = self._to_write(slot) if dirty else None
        if old != FREE:
            self._left += 1
            del self._slot[old]
        self._slot[key], self._key[slot] = slot, key
        self._busy_S[slot], self._dirty_S[slot], self._uses_S[slot] = True, False, 0.0
        self.reads += 1
        self.writes += dirty
        # What is in the slot is written first, and so is the expert, if it is on its way out of another.
        # Whoever is waited for was handed to the threads before, so that this ends with a single one too.
        before = [self._writing[key]] if key in self._writing else []
        if job is not None:
            self._writing[old] = self._threads.submit(self.store.write, *job)
            before.append(self._writing[old])
        self._filling[slot] = self._threads.submit(self._fill, slot, key, before)

    def _fill(self, slot: int, key: Key, before: "list[Future[None]]") -> None:
        for written in before:
            written.result()
        self.store.read(*key, self._bytes(slot))

    def _finish(self, slot: int) -> None:
        """Wait until a slot has been filled; one that could not be is free again."""
        future = self._filling.pop(slot, None)
        if future is None:
            return
        try:
            future.result()
        except BaseException:
            del self._slot[self._key[slot]]
            self._key[slot] = FREE
            raise
        finally:
            self._writing = {key: write for key, write in self._writing.items() if not write.done()}

    def _end_ahead(self, slot: int) -> None:
        """Wait until a slot that is written ahead has been; one that could not be stays changed."""
        future = self._ahead.pop(slot, None)
        if future is not None:
            try:
                future.result()
            except BaseException:
                self._dirty_S[slot] = True
                raise

    def write_back(self) -> None:
        """Write everything that was changed, and have it be on the disk. Raises ResourceError."""
        for slot in list(self._filling):
            self._finish(slot)
        for slot in list(self._ahead):
            self._end_ahead(slot)
        dirty = [int(slot) for slot in np.flatnonzero(self._dirty_S)]
        jobs = [self._to_write(slot) for slot in dirty]  # all places first: for these there may be no room
        for written in [self._threads.submit(self.store.write, *job) for job in jobs]:
            written.result()
        self._dirty_S[dirty] = False
        self.writes += len(dirty)
        self.store.flush()

    def forget(self) -> None:
        """Give up everything that is held, changed or not."""
        for slot in list(self._filling):
            with suppress(CheckpointError):
                self._finish(slot)
        for slot in list(self._ahead):
            with suppress(ResourceError):
                self._end_ahead(slot)
        self._slot.clear()
        self._key = [FREE] * self.slots
        self._dirty_S[:] = False
        self._busy_S[:] = False
        self._uses_S[:] = 0

    def _to_write(self, slot: int) -> tuple[int, int, int, memoryview]:
        """What the store's ``write`` is told to write a slot. Raises ResourceError where it has no room."""
        layer, expert = self._key[slot]
        return layer, expert, self.store.place_for(layer, expert), self._bytes(slot)

    def _bytes(self, slot: int) -> memoryview:
        return self._view[slot * self.store.record : (slot + 1) * self.store.record]
