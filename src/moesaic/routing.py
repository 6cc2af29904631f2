"""Routing: the one value that says which token went to which expert.

Losses, the router-bias update, the metrics, the analysis and every picture read this value;
no module keeps a counter of its own.

Shape legend: T tokens (batch and positions flattened), E experts, K choices per token.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The decision of one router for the T tokens of one call.

    Attributes:
        weight_TK: gate weight of each choice, float32. Only entries kept by ``keep_TK`` are used.
        expert_TK: chosen expert of each choice, int64 in [0, E). In descending weight for routers
            where tokens choose; column e is expert e where experts choose (then K = E).
        keep_TK: whether the choice is carried out, bool. Capacity, a dynamic number of experts,
            expert choice and padding all show here and nowhere else.
        logits_TE: router logits before noise, bias and softmax, float32. The z-loss reads them.
        probs_TE: the scores in [0, 1] that the router ranked by, float32. Each row of a softmax
            router sums to 1.
        wanted_TK: the choices before capacity was applied, bool. ``keep_TK`` implies it; what it
            holds beyond ``keep_TK`` was dropped.
        real_T: False where the token is padding, bool; None when every token is real.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    keep_TK: Tensor
    logits_TE: Tensor
    probs_TE: Tensor
    wanted_TK: Tensor
    real_T: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @cached_property
    def distribution_TE(self) -> Tensor:
        """``probs_TE`` with rows that sum to 1: sigmoid scores are normalised as DeepSeek-V3 does (arXiv
        2412.19437, eq. 19). The balance loss and the entropy bonus read it."""
        return self.probs_TE / self.probs_TE.sum(-1, keepdim=True).clamp(min=1e-20)

    def counts_E(self, *, wanted: bool = False) -> Tensor:
        """How many choices each expert carries out (or, with ``wanted``, was asked for); int64."""
        chosen_TK = self.wanted_TK if wanted else self.keep_TK
        return torch.bincount(self.expert_TK[chosen_TK], minlength=self.num_experts)

    def real_tokens(self) -> int:
        return self.expert_TK.shape[0] if self.real_T is None else int(self.real_T.sum())

    def detach(self) -> "Routing":
        """The same decision without its autograd history."""
        return Routing(
            self.weight_TK.detach(),
            self.expert_TK,
            self.keep_TK,
            self.logits_TE.detach(),
            self.probs_TE.detach(),
            self.wanted_TK,
            self.real_T,
        )
