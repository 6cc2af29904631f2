"""The experts of a model on disk: gathered as they are now, updated by AdamW after a step."""

from collections.abc import Sequence
from typing import Literal

import torch

from moesaic.native.adamw import Scalars
from moesaic.offload import adamw
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.catch_up import AdamW, History, scalars_of, scalars_of_step
from moesaic.offload.factors import Factors, merged
from moesaic.offload.pool import Pool
from moesaic.offload.records import ExpertShape, Layout, Matrices
from moesaic.offload.store import Store

Mode = Literal["exact", "lazy"]
# Experts at once, enough for a batched product, and bytes of their weights, for large ones.
_CHUNK, _CHUNK_BYTES = 32, 2**27
_KEPT_BYTES = 2**28  # of float32 matrices of all layers that wait for their backward pass


class Room:
    """Memory for the matrices of a chunk, used again and again: to touch new pages for each takes as long as
    to compute it."""

    def __init__(self, shape: ExpertShape, chunk: int) -> None:
        self.shape, self.chunk = shape, chunk
        self._stacks: dict[torch.dtype, Matrices] = {}

    def of(self, experts: int, dtype: torch.dtype) -> Matrices:
        """Uninitialised matrices of so many experts, at most a chunk."""
        if dtype not in self._stacks:
            with torch.inference_mode(False):  # the first to ask may be in it, a later one not
                self._stacks[dtype] = self.shape.stacks(self.chunk, dtype)
        first, down = self._stacks[dtype]
        return first[:experts], down[:experts]


class StreamedExperts:
    """The experts of a model out of one pool, never changed."""

    def __init__(self, pool: Pool, layout: Layout) -> None:
        self.pool, self.layout, self.shape = pool, layout, layout.shape
        self.experts = pool.store.experts
        self.chunk = max(1, min(_CHUNK, pool.slots // 2, _CHUNK_BYTES // pool.store.record))
        self.kept = _KEPT_BYTES // (4 * self.shape.parameters * pool.store.layers)
        self.last: list[list[int]] = [[] for _ in range(pool.store.layers)]
        self._room = Room(self.shape, self.chunk)

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read experts that will be gathered next."""
        self.pool.prefetch(layer, experts)

    def gather(
        self, layer: int, experts: Sequence[int], dtype: torch.dtype, *, keep: bool = False
    ) -> Matrices:
        """Matrices as they are now; good until the next call, or update, or with ``keep`` for ever."""
        room = self.shape.stacks(len(experts), dtype) if keep else self._room.of(len(experts), dtype)
        slots = self.pool.acquire(layer, experts)
        try:
            scalars = [self._missed(layer, expert) for expert in experts]
            adamw.gather(self.layout, self.pool.records, slots, scalars, room)
        finally:
            self.pool.release(slots)
        return room

    def close(self) -> None:
        """Give memory, files, threads and the lock back; nothing is written."""
        self.pool.close()

    def _missed(self, layer: int, expert: int, now: tuple[float, float, int] | None = None) -> Scalars:
        """What an expert missed since its record was written: nothing."""
        return Scalars()


class DiskExperts(StreamedExperts):
    """All banks of a model, which train. ``history`` holds the steps so far; an expert's stamp in the
    store's index is the step that its record is as of.

    ``exact``: what dense AdamW would have done to an expert while it was idle is made up for whenever it is
    read (catch_up.py), so that training equals dense AdamW. ``lazy``: its moments stand still meanwhile, and
    its own steps are counted. Reading changes no record: only a step does."""

    def __init__(self, pool: Pool, store: Store, constants: AdamW, mode: Mode = "exact") -> None:
        """``pool`` is one of ``store``."""
        super().__init__(pool, store.options.layout)
        self.store, self.mode = store, mode
        self.history = History(constants)
        self.banks = [OffloadedExperts(self, layer) for layer in range(store.layers)]

    def take_factors(self) -> list[tuple[int, Factors]]:
        """The gradients of every layer that has any, the last layer first."""
        taken = [(bank.layer, bank.take_factors()) for bank in reversed(self.banks)]
        return [(layer, merged(parts)) for layer, parts in taken if parts]

    @torch.no_grad()
    def update(self, gradients: Sequence[tuple[int, Factors]], rate: float, scale: float) -> int:
        """One step of AdamW on every expert that has a gradient, times ``scale``; how many those were."""
        updated = 0
        for layer, factors in gradients:
            for number, part in enumerate(factors.chunks(self.chunk)):
                following = (number + 1) * self.chunk
                self._update(layer, part, rate, scale)
                self.pool.prefetch(layer, factors.experts[following : following + self.chunk])
            updated += len(factors.experts)
        self.history.add(rate)
        self.pool.write_ahead()
        return updated

    def _update(self, layer: int, part: Factors, rate: float, scale: float) -> None:
        index, step = self.store.index, self.history.step + 1
        gradients = self._room.of(len(part.experts), part.x_RD.dtype)
        part.write_gradients(gradients)
        slots = self.pool.acquire(layer, part.experts)
        try:
            index.steps[layer, part.experts] += 1
            scalars = [self._missed(layer, expert, (rate, scale, step)) for expert in part.experts]
            adamw.update(self.layout, self.pool.records, slots, scalars, gradients)
            index.stamp[layer, part.experts] = step
            self.pool.change(slots)
        finally:
            self.pool.release(slots)

    def _missed(self, layer: int, expert: int, now: tuple[float, float, int] | None = None) -> Scalars:
        """What an expert missed since its stamp, and the step (rate, scale, number) that it makes ``now``."""
        if not self.banks[layer].trains:  # not even its weights decay
            return Scalars()
        stamp, c = int(self.store.index.stamp[layer, expert]), self.history.constants
        exact = self.mode == "exact" and stamp > 0  # one that was never trained has no momentum, only decay
        by = self.history.since(stamp) if exact else self.history.decay_since(stamp)
        if now is None:
            return scalars_of(by)
        rate, scale, step = now
        count = step if self.mode == "exact" else int(self.store.index.steps[layer, expert])
        seed = (step * 1_000_003 + layer) * self.store.options.experts + expert
        return scalars_of_step(by, c, rate, count, scale, seed)
