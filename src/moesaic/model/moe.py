"""The sparse layer: route, sort by expert, run the bank, combine.

Shape legend: T tokens (batch and positions flattened), D width, E experts, K choices per token,
R rows (the kept token-expert pairs, sorted by expert; perhaps fillers between experts).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.model.dropout import dropout
from moesaic.model.experts import ExpertOptions, Experts, FeedForward
from moesaic.model.routers import BaseRouterOptions, build_router
from moesaic.routing import Routing

Fill = Callable[[list[int], torch.device], list[int]]


class MoE(nn.Module):
    """A router, a bank of experts, and perhaps a shared expert (gated as in Qwen2-MoE, or not).

    The bank is replaceable by anything that turns rows sorted by expert, and the counts, into rows, and
    says by ``fill`` how many rows it wants of each.
    """

    def __init__(
        self, router: BaseRouterOptions, experts: ExpertOptions, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate = build_router(router, width, experts.count)
        self.experts = Experts(experts, width)
        self.shared_expert: FeedForward | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if experts.shared is not None:
            self.shared_expert = FeedForward(experts.shared, width)
            if experts.shared_gate:
                self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x_TD: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The layer's output [T, D] and the routing that made it."""
        routing: Routing = self.gate(x_TD, real_T)
        T, K = routing.expert_TK.shape
        order_R, place_TK, counts_E = sort_by_expert(routing, self.experts.fill)
        token_R = (order_R // K).clamp(max=T - 1)  # a filler row holds some token; nothing reads it
        rows_RD = _Dispatch.apply(x_TD, token_R, place_TK)  # type: ignore[no-untyped-call]
        rows_RD = self.experts(rows_RD, counts_E)
        rows_RD = dropout(rows_RD, self.dropout, self.training)
        y_TD: Tensor = _Combine.apply(rows_RD, routing.weight_TK, order_R, token_R, place_TK)  # type: ignore[no-untyped-call]
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            y_TD = y_TD + shared_TD
        return y_TD, routing


def sort_by_expert(routing: Routing, fill: Fill | None = None) -> tuple[Tensor, Tensor, list[int]]:
    """The kept choices in expert order, each expert's rows filled up as the bank wishes.

    Returns order_R (the flat index t·K + k of each row, T·K for a filler), place_TK (the row of
    each choice, R where it is not kept) and the number of rows of each expert, fillers included.
    """
    num_experts, device = routing.num_experts, routing.expert_TK.device
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
    return order_R, place_N.view_as(routing.expert_TK), counts_E


# Dispatch and combine are each other's transpose. Written as gathers in both directions: the
# backward of a plain index is a scatter-add, which on CPU adds one row at a time (measured at 4,096
# tokens, top-2, width 256: benchmarks/cpu_choices.py).


class _Dispatch(torch.autograd.Function):
    """rows[r] = x[token of r]."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_rows_RD: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _gather_sum(d_rows_RD, None, place_TK), None, None


class _Combine(torch.autograd.Function):
    """y[t] = sum over k of weight[t, k] · rows[place of (t, k)]; the weights are rounded to the rows' dtype,
    the sum is float32 until it is given back in that dtype."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, weight_TK: Tensor, order_R: Tensor, token_R: Tensor, place_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_TK, order_R, token_R)
        return _gather_sum(rows_RD, weight_TK, place_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_TK, order_R, token_R = ctx.saved_tensors
        dy_RD = dy_TD.index_select(0, token_R)
        # One entry more, of weight zero, stands for the fillers: no gradient passes through them.
        weight_N1 = torch.cat([weight_TK.flatten(), weight_TK.new_zeros(1)])
        d_weight_N1 = torch.zeros_like(weight_N1)
        d_weight_N1[order_R] = (dy_RD * rows_RD).sum(-1).to(weight_TK.dtype)
        d_rows_RD = dy_RD.mul_(weight_N1[order_R][:, None].to(dy_RD.dtype))
        return d_rows_RD, d_weight_N1[:-1].view_as(weight_TK), None, None, None


def _gather_sum(rows_RD: Tensor, weight_TK: Tensor | None, place_TK: Tensor) -> Tensor:
    """Sum over k of rows[place[:, k]], weighted; a place of R reads zero. A bag of embeddings is just
    this, in one pass over the rows; it sums in float32 and rounds once."""
    if int(place_TK.max()) == len(rows_RD):
        # Some choice was not kept: one more row, of zeros, stands for it.
        rows_RD = torch.cat([rows_RD, rows_RD.new_zeros(1, rows_RD.shape[1])])
    weight_TK = None if weight_TK is None else weight_TK.to(rows_RD.dtype)
    return F.embedding_bag(place_TK, rows_RD, mode="sum", per_sample_weights=weight_TK)
