"""The sparse layer: route, sort by expert, run the bank.

Shape legend: T tokens (batch and positions flattened), D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from moesaic.model.dispatch import Dispatch, sort_by_expert
from moesaic.model.experts import ExpertOptions, Experts, FeedForward
from moesaic.model.routers import BaseRouterOptions, build_router
from moesaic.routing import Routing


class Bank(Protocol):
    """What computes the chosen experts: ``Experts``, or another module that keeps them elsewhere."""

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        """How many rows to lay out for each expert, ``counts_E`` of them real."""
        ...

    def __call__(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, dropout: float = 0.0) -> Tensor:
        """Each token's weighted sum over its experts, [T, D]."""
        ...


class MoE(nn.Module):
    """A router, a bank of experts, and perhaps a shared expert (gated as in Qwen2-MoE, or not).

    The bank is replaceable by any module that is a ``Bank`` too.
    """

    def __init__(
        self, router: BaseRouterOptions, experts: ExpertOptions, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate = build_router(router, width, experts.count)
        self.experts: Bank = Experts(experts, width)
        self.shared_expert: FeedForward | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if experts.shared is not None:
            self.shared_expert = FeedForward(experts.shared, width)
            if experts.shared_gate:
                self.shared_expert_gate = nn.Linear(width, 1, bias=False)

    def forward(self, x_TD: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The layer's output [T, D] and the routing that made it."""
        routing: Routing = self.gate(x_TD, real_T)
        dispatch = sort_by_expert(routing, self.experts.fill)
        y_TD: Tensor = self.experts(x_TD, routing.weight_TK, dispatch, self.dropout if self.training else 0.0)
        if self.shared_expert is not None:
            shared_TD = self.shared_expert(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = shared_TD * self.shared_expert_gate(x_TD).sigmoid()
            y_TD = y_TD + shared_TD
        return y_TD, routing
