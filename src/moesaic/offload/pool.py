"""Slots in memory for the experts in use; the others are on disk.

Who is used least often leaves first. Reads and writes run in threads; what will be needed is asked for before
it is. All bookkeeping is done by the caller's thread, so nothing here needs a lock.

Shape legend: S slots.
"""

import mmap
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from moesaic.errors import RecipeError
from moesaic.files import human_size
from moesaic.offload.store import Store

Key = tuple[int, int]  # layer, expert
_FADE = 0.5  # a count is halved after every step of as many uses as there are slots
FREE: Key = (-1, -1)


class Pool:
    """As many records of ``store`` as ``memory`` bytes hold."""

    def __init__(self, store: Store, memory: int, threads: int = 8) -> None:
        """Raises RecipeError for less memory than two records take."""
        slots = min(memory // store.record, store.options.layers * store.options.experts)
        if slots < 2:
            raise RecipeError(
                f"offload.memory: {human_size(memory)} hold {memory // store.record} experts of "
                f"{human_size(store.record)}; give {human_size(2 * store.record)} or more"
            )
        self.store, self.slots = store, int(slots)
        self._memory = mmap.mmap(-1, self.slots * store.record)  # aligned to pages, as direct I/O asks for
        self.records = torch.frombuffer(self._memory, dtype=torch.uint8).view(self.slots, store.record)
        self._view = memoryview(self._memory)
        self._slot: dict[Key, int] = {}
        self._key: list[Key] = [FREE] * self.slots
        self._uses_S = np.zeros(self.slots)
        self._last_S = np.zeros(self.slots, np.int64)
        self._dirty_S = np.zeros(self.slots, bool)
        self._busy_S = np.zeros(self.slots, bool)  # in use by what is being computed, or being filled
        self._clock = self._since_fade = 0
        self._threads = ThreadPoolExecutor(threads, "experts")
        self._filling: dict[int, Future[None]] = {}
        self._writing: dict[Key, Future[None]] = {}  # by who is being written
        self.reads = self.writes = self.hits = 0  # records; hits: those that were here already

    def acquire(self, layer: int, experts: Sequence[int]) -> list[int]:
        """The slots of these experts, filled; they stay until ``release``. Raises as Store.read and write,
        and RecipeError where there are more than slots."""
        slots = self._reserve(layer, experts, wait=True)
        for slot in slots:
            self._finish(slot)
        return slots

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read these experts, as many as there is room for."""
        room = self.slots - int(self._busy_S.sum())
        missing = [e for e in experts if (layer, e) not in self._slot][: max(0, room)]
        if missing:
            self.release(self._reserve(layer, missing, wait=False))

    def release(self, slots: Sequence[int]) -> None:
        """Let these slots be taken by others again."""
        self._busy_S[list(slots)] = False

    def change(self, slots: Sequence[int]) -> None:
        """Say that what these slots hold was changed: it is written before they are taken."""
        self._dirty_S[list(slots)] = True

    def _reserve(self, layer: int, experts: Sequence[int], wait: bool) -> list[int]:
        known = [self._slot.get((layer, expert)) for expert in experts]
        for slot in known:
            if slot is not None:
                self._busy_S[slot] = True
        missing = [n for n, slot in enumerate(known) if slot is None]
        self.hits += len(known) - len(missing)
        victims = self._victims(len(missing))
        slots = [-1 if slot is None else slot for slot in known]
        for n, slot in zip(missing, victims, strict=True):
            slots[n] = slot
            self._replace(slot, (layer, experts[n]))
        self._clock += 1
        self._uses_S[slots] += 1
        self._last_S[slots] = self._clock
        self._since_fade += len(slots)
        if self._since_fade > self.slots:
            self._uses_S *= _FADE
            self._since_fade = 0
        return slots

    def _victims(self, count: int) -> list[int]:
        """The slots to give up: those used least, and of these the longest ago."""
        if not count:
            return []
        free = np.flatnonzero(~self._busy_S)
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
        self._finish(slot)
        old, dirty = self._key[slot], bool(self._dirty_S[slot])
        if old != FREE:
            del self._slot[old]
        place = self.store.place_for(*old) if dirty else -1
        self._slot[key], self._key[slot] = slot, key
        self._busy_S[slot], self._dirty_S[slot], self._uses_S[slot] = True, False, 0.0
        self.reads += 1
        self.writes += dirty
        # An expert may be read back before it has been written: the read waits for that.
        self._filling[slot] = self._threads.submit(self._fill, slot, old, place, key, self._writing.get(key))
        if dirty:
            self._writing[old] = self._filling[slot]

    def _fill(self, slot: int, old: Key, place: int, key: Key, before: "Future[None] | None") -> None:
        view = self._bytes(slot)
        if place >= 0:
            self.store.write(*old, place, view)
        if before is not None:
            before.result()
        self.store.read(*key, view)

    def _finish(self, slot: int) -> None:
        """Wait until a slot has been filled."""
        future = self._filling.pop(slot, None)
        if future is not None:
            future.result()
            for key in [key for key, writing in self._writing.items() if writing is future]:
                del self._writing[key]

    def write_back(self) -> None:
        """Write everything that was changed, and have it be on the disk. Raises ResourceError."""
        for slot in list(self._filling):
            self._finish(slot)
        dirty = [int(slot) for slot in np.flatnonzero(self._dirty_S)]
        places = [self.store.place_for(*self._key[slot]) for slot in dirty]
        jobs = [
            self._threads.submit(self.store.write, *self._key[slot], place, self._bytes(slot))
            for slot, place in zip(dirty, places, strict=True)
        ]
        for job in jobs:
            job.result()
        self._dirty_S[dirty] = False
        self.writes += len(dirty)
        self.store.flush()

    def forget(self) -> None:
        """Give up everything that is held, changed or not."""
        for slot in list(self._filling):
            self._finish(slot)
        self._slot.clear()
        self._key = [FREE] * self.slots
        self._dirty_S[:] = False
        self._busy_S[:] = False
        self._uses_S[:] = 0

    def weights(self) -> Tensor:
        """The weights in all slots, a view [S, P]."""
        return self.store.options.layout.weights_of(self.records)

    def _bytes(self, slot: int) -> memoryview:
        return self._view[slot * self.store.record : (slot + 1) * self.store.record]
