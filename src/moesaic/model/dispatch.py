"""Who works on what: the kept choices of all tokens, sorted by expert.

Shape legend: T tokens, D width, E experts, K choices per token, R rows (the kept token-expert pairs, sorted
by expert; perhaps fillers between experts), N = T·K choices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.native import library
from moesaic.native.dispatch import count_choices, place_choices
from moesaic.native.rows import Rows
from moesaic.routing import Routing

Fill = Callable[[list[int], torch.device], list[int]]


@dataclass(frozen=True)
class Dispatch:
    """The rows that experts work on, expert 0 on the first ``counts_E[0]``, expert 1 on the next, and so on.

    Attributes:
        order_R: the choice t·K + k of each row, int64; T·K for a filler.
        token_R: its token, int64; a filler holds some token, and its weight is zero.
        place_TK: the row of each choice, int64; R where it is not kept.
        counts_E: rows of each expert, fillers included.
        complete: whether every choice is kept.
    """

    order_R: Tensor
    token_R: Tensor
    place_TK: Tensor
    counts_E: list[int]
    complete: bool = True

    @cached_property
    def rows(self) -> Rows:
        """Whose rows they are, without the experts that have none."""
        return rows_of(self.counts_E)

    @cached_property
    def layer(self) -> "Layer":
        """All of these rows."""
        return Layer.of(self.counts_E, self.rows)

    def weight_R(self, weight_TK: Tensor) -> Tensor:
        """The weight of each row, zero for fillers."""
        weight_N1 = torch.cat([weight_TK.flatten(), weight_TK.new_zeros(1)])
        return weight_N1.index_select(0, self.order_R)

    def weight_gradient(self, d_weight_R: Tensor) -> Tensor:
        """The transpose of ``weight_R``: [T, K], zero where a choice is not kept."""
        d_weight_N1 = d_weight_R.new_zeros(self.place_TK.numel() + 1)
        d_weight_N1[self.order_R] = d_weight_R
        return d_weight_N1[:-1].view_as(self.place_TK)

    def combine(self, rows_RD: Tensor) -> Tensor:
        """The sum of each token's rows, [T, D]. A bag of embeddings is just this, in one pass over the rows;
        it sums in float32 and rounds once. An index and a sum over k would write T·K rows first, and the
        backward of an index adds one row at a time (benchmarks/cpu_choices.py)."""
        if not self.complete or not len(rows_RD):
            # One more row, of zeros, stands for a choice that was not kept.
            rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
        return F.embedding_bag(self.place_TK, rows_RD, mode="sum")


@dataclass(frozen=True)
class Layer:
    """All rows of a layer. ``equal``: each of its experts has as many."""

    rows: Rows
    equal: bool

    @classmethod
    def of(cls, counts_E: list[int], rows: Rows | None = None) -> "Layer":
        equal = min(counts_E, default=0) == max(counts_E, default=0) > 0
        return cls(rows_of(counts_E) if rows is None else rows, equal)


def rows_of(counts_E: list[int]) -> Rows:
    """``counts_E`` without the experts that have no rows: a bank may have thousands, of which a token uses
    eight."""
    hit = [e for e, count in enumerate(counts_E) if count]
    return Rows(hit, list(accumulate(counts_E[e] for e in hit)))


def sort_by_expert(routing: Routing, fill: Fill | None = None) -> Dispatch:
    """The kept choices in expert order, each expert's rows filled up as the bank wishes."""
    expert_TK, keep_TK = routing.expert_TK.contiguous(), routing.keep_TK.contiguous()
    by_counting = expert_TK.device.type == "cpu" and library.available()
    real_E = (count_choices if by_counting else _count)(expert_TK, keep_TK, routing.num_experts)
    counts_E = real_E if fill is None else fill(real_E, expert_TK.device)
    starts_E = [0, *accumulate(counts_E)]
    place = place_choices if by_counting else _place
    order_R, token_R, place_TK = place(expert_TK, keep_TK, starts_E[:-1], starts_E[-1])
    return Dispatch(order_R, token_R, place_TK, counts_E, sum(real_E) == expert_TK.numel())


# The same by PyTorch's sort, for GPUs and machines without a compiler.


def _count(expert_TK: Tensor, keep_TK: Tensor, num_experts: int) -> list[int]:
    return torch.bincount(expert_TK[keep_TK], minlength=num_experts).tolist()


def _place(
    expert_TK: Tensor, keep_TK: Tensor, starts_E: list[int], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    T, K = expert_TK.shape
    E, N, device = len(starts_E), expert_TK.numel(), expert_TK.device
    # Choices that are not kept belong to one expert more, which sorts last.
    expert_N = torch.where(keep_TK, expert_TK, E).flatten()
    order_N = expert_N.argsort(stable=True)
    sorted_N = expert_N[order_N]
    counts = torch.bincount(expert_N, minlength=E + 1)
    shift = torch.tensor([*starts_E, rows], device=device) - (counts.cumsum(0) - counts)
    row_N = torch.where(sorted_N < E, torch.arange(N, device=device) + shift[sorted_N], rows)
    order_R = torch.full((rows + 1,), N, device=device)
    order_R[row_N] = order_N
    order_R = order_R[:rows]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = row_N
    return order_R, (order_R // K).clamp_(max=T - 1), place_N.view(T, K)
