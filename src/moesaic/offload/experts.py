"""The experts of a model on disk: gathered as they are now, updated by AdamW once a step has its gradients.

Shape legend: U experts of a chunk, P parameters of an expert.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.catch_up import AdamW, CatchUp, History, catch_up
from moesaic.offload.factors import Factors, merged
from moesaic.offload.pool import Pool
from moesaic.offload.records import rounded_to_bf16

Mode = Literal["exact", "lazy"]
_CHUNK = 32  # experts at once: enough for a batched product, few for the memory


class DiskExperts:
    """All banks of a model, out of one pool. ``history`` holds the steps so far; an expert's stamp in the
    store's index is the step that its record is as of.

    ``exact``: an expert's idle steps are made up for when it is next gathered (catch_up.py), so that training
    equals dense AdamW. ``lazy``: its moments stand still meanwhile, and its own steps are counted."""

    def __init__(self, pool: Pool, constants: AdamW, mode: Mode = "exact") -> None:
        self.pool, self.store, self.mode = pool, pool.store, mode
        self.layout = pool.store.options.layout
        self.shape = self.layout.shape
        self.chunk = max(1, min(_CHUNK, pool.slots // 2))  # so that the next can be read beside it
        self.history = History(constants)
        self.banks = [OffloadedExperts(self, layer) for layer in range(pool.store.options.layers)]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Begin to read experts that will be gathered next."""
        self.pool.prefetch(layer, experts)

    @torch.no_grad()
    def gather(self, layer: int, experts: Sequence[int], learn: bool) -> Tensor:
        """Weights [U, P] as of the last step, a copy. What experts missed while they were idle is kept if
        they are about to be trained, and else made up for in the copy alone, so that looking changes
        nothing."""
        slots = self.pool.acquire(layer, experts)
        try:
            weights = self.pool.weights()[slots]
            late = [n for n, expert in enumerate(experts) if self._is_late(layer, expert)]
            if not late:
                return weights
            names, places = [experts[n] for n in late], [slots[n] for n in late]
            caught = self._caught_up(layer, names, places)
            # One that was never trained stays as it began: its decay follows from that, however often it is
            # read.
            trained = [n for n, expert in enumerate(names) if self.store.index.stamp[layer, expert] > 0]
            if learn and trained:
                some = tuple(t[trained] for t in caught)
                self._keep(
                    layer, [names[n] for n in trained], [places[n] for n in trained], some, self.history.step
                )
            if learn and len(trained) == len(experts):  # as they are kept, rounded and all
                return self.pool.weights()[slots]
            weights = self.pool.weights()[slots].float()
            copied = [n for n in range(len(late)) if not learn or n not in set(trained)]
            weights[[late[n] for n in copied]] = caught[0][copied]
            return weights
        finally:
            self.pool.release(slots)

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
        return updated

    def _update(self, layer: int, part: Factors, rate: float, scale: float) -> None:
        experts, c, step = part.experts, self.history.constants, self.history.step + 1
        slots = self.pool.acquire(layer, experts)
        try:
            p, m, v = self._caught_up(layer, experts, slots)
            gradient = part.gradients(self.shape)
            if scale != 1.0:
                gradient.mul_(scale)
            index = self.store.index
            index.steps[layer, experts] += 1
            own = index.steps[layer, experts] if self.mode == "lazy" else [step] * len(experts)
            counts = torch.tensor(own, dtype=torch.float64)[:, None]
            p.mul_(1 - rate * c.weight_decay)
            m.lerp_(gradient, 1 - c.beta1)
            v.mul_(c.beta2).addcmul_(gradient, gradient, value=1 - c.beta2)
            denominator = v.sqrt().div_((1 - c.beta2**counts).sqrt().float()).add_(c.eps)
            p.addcdiv_(m.mul((rate / (1 - c.beta1**counts)).float()), denominator, value=-1.0)
            self._keep(layer, experts, slots, (p, m, v), step)
        finally:
            self.pool.release(slots)

    def _is_late(self, layer: int, expert: int) -> bool:
        stamp, step = int(self.store.index.stamp[layer, expert]), self.history.step
        return stamp < step and (stamp > 0 or self.history.constants.weight_decay > 0)

    def _caught_up(
        self, layer: int, experts: Sequence[int], slots: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and moments as of the last step, float32 [U, P] each, copies."""
        records = self.pool.records[list(slots)]
        p = self.layout.weights_of(records).float()
        first, second = (t.contiguous() for t in self.layout.read_moments(records))
        for n, expert in enumerate(experts):
            by = self._since(int(self.store.index.stamp[layer, expert]))
            catch_up(p[n], first[n], second[n], by)
        return p, first, second

    def _since(self, stamp: int) -> CatchUp:
        if self.mode == "lazy" or stamp == 0:
            return self.history.decay_since(stamp)
        return self.history.since(stamp)

    def _keep(
        self,
        layer: int,
        experts: Sequence[int],
        slots: Sequence[int],
        values: tuple[Tensor, ...],
        step: int,
    ) -> None:
        """Put weights and moments back into their slots, as of ``step``."""
        p, m, v = values
        where = list(slots)
        records = self.pool.records[where]
        if self.layout.weights == "bf16":
            E = self.store.options.experts
            rows = [rounded_to_bf16(p[n], (step * 1_000_003 + layer) * E + e) for n, e in enumerate(experts)]
            p = torch.stack(rows)
        self.layout.weights_of(records).copy_(p)
        self.layout.write_moments(records, m, v)
        self.pool.records[where] = records
        self.store.index.stamp[layer, list(experts)] = step
        self.pool.change(where)
