"""Who works on what: the kept choices of all tokens, sorted by expert.

Shape legend: T tokens, D width, E experts, K choices per token, R rows (the kept token-expert pairs, sorted
by expert; perhaps fillers between experts), N = T·K choices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

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


def sort_by_expert(routing: Routing, fill: Fill | None = None) -> Dispatch:
    """The kept choices in expert order, each expert's rows filled up as the bank wishes."""
    num_experts, device = routing.num_experts, routing.expert_TK.device
    T, K = routing.expert_TK.shape
    # Choices that are not kept belong to one expert more, which sorts last.
    expert_N = torch.where(routing.keep_TK, routing.expert_TK, num_experts).flatten()
    order_N = expert_N.argsort(stable=True)
    real_E: list[int] = torch.bincount(expert_N, minlength=num_experts + 1)[:num_experts].tolist()
    counts_E = real_E if fill is None else fill(real_E, device)
    kept, rows = sum(real_E), sum(counts_E)
    row_N = torch.arange(len(expert_N), device=device)
    row_N[kept:] = rows
    order_R = order_N[:kept]
    if rows != kept:  # fillers move the rows of every later expert down
        shift_E = torch.tensor([0, *counts_E]) - torch.tensor([0, *real_E])
        row_N[:kept] += shift_E.cumsum(0)[:num_experts].to(device)[expert_N[order_R]]
        order_R = torch.full((rows,), len(expert_N), device=device)
        order_R[row_N[:kept]] = order_N[:kept]
    place_N = torch.empty_like(order_N)
    place_N[order_N] = row_N
    token_R = (order_R // K).clamp_(max=T - 1)
    return Dispatch(order_R, token_R, place_N.view_as(routing.expert_TK), counts_E, kept == len(expert_N))
