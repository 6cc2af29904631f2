"""Who took what, counted over a stream of text: all that the analysis of a routing is computed from.

Counts are exact and grow with what occurs, not with how much text is read: of the vocabulary only the pairs
of token and expert that were seen are kept.

Shape legend: L sparse layers, T tokens of a batch, K choices, E experts, C domains, n distinct keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moesaic.routing import Routing

Kind = Literal["input", "predicted", "true"]
KINDS: tuple[Kind, ...] = ("input", "predicted", "true")


class PairCounts:
    """How often each (token, expert) occurred, by sorted keys token · E + expert."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self._key_n = torch.empty(0, dtype=torch.int64)
        self._count_n = torch.empty(0, dtype=torch.int64)

    def add(self, token_T: Tensor, expert_TK: Tensor, keep_TK: Tensor) -> None:
        """Count the kept choices of every token."""
        key_TK = token_T[:, None] * self.experts + expert_TK
        new, counts = key_TK[keep_TK].unique(return_counts=True)
        both, place = torch.cat([self._key_n, new]).unique(return_inverse=True)
        total = torch.zeros(len(both), dtype=torch.int64)
        self._key_n = both
        self._count_n = total.index_add_(0, place, torch.cat([self._count_n, counts]))

    def rows(self) -> tuple[Tensor, Tensor]:
        """The tokens that occurred, int64 [n], and each one's choices of every expert, int64 [n, E]."""
        token_n, row = (self._key_n // self.experts).unique(return_inverse=True)
        count_nE = torch.zeros(len(token_n), self.experts, dtype=torch.int64)
        count_nE[row, self._key_n % self.experts] = self._count_n
        return token_n, count_nE


@dataclass
class Census:
    """The counts of one model over labelled text.

    Attributes:
        domains: labels of the text, in the order of C; ``names`` of the experts, where they have any.
        token_C: tokens of each domain.
        chosen_LCE: choices of each expert at top-k; ``first_LCE`` at top-1.
        pair_LEE: tokens for which both experts were chosen, symmetric, zero on the diagonal.
        adjacent_LEE: the same where one's rank is next to the other's (what OLMoE's script counts).
        step_LEE: first choice in one layer (rows) and in the next (columns); L − 1 of them.
        words: for each kind of token id and each layer, first choices by id.
    """

    layers: list[int]
    experts: int
    domains: list[str]
    names: list[str] | None = None
    token_C: Tensor = field(init=False)
    chosen_LCE: Tensor = field(init=False)
    first_LCE: Tensor = field(init=False)
    pair_LEE: Tensor = field(init=False)
    adjacent_LEE: Tensor = field(init=False)
    step_LEE: Tensor = field(init=False)
    words: dict[Kind, list[PairCounts]] = field(init=False)

    def __post_init__(self) -> None:
        L, C, E = len(self.layers), len(self.domains), self.experts
        zeros = {"dtype": torch.int64}
        self.token_C = torch.zeros(C, **zeros)  # type: ignore[call-overload]
        self.chosen_LCE, self.first_LCE = (torch.zeros(L, C, E, dtype=torch.int64) for _ in range(2))
        self.pair_LEE, self.adjacent_LEE = (torch.zeros(L, E, E, dtype=torch.int64) for _ in range(2))
        self.step_LEE = torch.zeros(max(0, L - 1), E, E, dtype=torch.int64)
        self.words = {kind: [PairCounts(E) for _ in range(L)] for kind in KINDS}

    @property
    def shown(self) -> list[int]:
        """Places of the first, middle and last sparse layer, which stand for all where there is no room."""
        last = len(self.layers) - 1
        return sorted({0, last // 2, last})

    def add(
        self, domain: int, ids: dict[Kind, Tensor], counted_T: Tensor, routings: Sequence[Routing]
    ) -> None:
        """Count a batch of one domain. ``ids`` [T] are what went in, what the model thought would follow, and
        what did; ``counted_T`` says which tokens count (no padding, something follows)."""
        self.token_C[domain] += int(counted_T.sum())
        before_T: Tensor | None = None
        for n, routing in enumerate(routings):
            expert_TK = routing.expert_TK.cpu()
            keep_TK = routing.keep_TK.cpu() & counted_T[:, None]
            first_T = expert_TK[:, 0]
            alone_TK = torch.zeros_like(keep_TK)
            alone_TK[:, 0] = keep_TK[:, 0]
            self.chosen_LCE[n, domain] += torch.bincount(expert_TK[keep_TK], minlength=self.experts)
            self.first_LCE[n, domain] += torch.bincount(expert_TK[alone_TK], minlength=self.experts)
            self._add_pairs(n, expert_TK, keep_TK)
            if before_T is not None:
                both = alone_TK[:, 0]
                self.step_LEE[n - 1] += _table(before_T[both], first_T[both], self.experts)
            before_T = first_T
            for kind in KINDS:
                self.words[kind][n].add(ids[kind], expert_TK, alone_TK)

    def _add_pairs(self, n: int, expert_TK: Tensor, keep_TK: Tensor) -> None:
        chosen_TE = torch.zeros(len(expert_TK), self.experts)
        chosen_TE.scatter_add_(1, expert_TK, keep_TK.float())
        pair_EE = (chosen_TE.t() @ chosen_TE).round().long()
        self.pair_LEE[n] += pair_EE.fill_diagonal_(0)
        for k in range(expert_TK.shape[1] - 1):
            both = keep_TK[:, k] & keep_TK[:, k + 1]
            table = _table(expert_TK[both, k], expert_TK[both, k + 1], self.experts)
            self.adjacent_LEE[n] += table + table.t()


def _table(row_T: Tensor, column_T: Tensor, experts: int) -> Tensor:
    """How often each (row, column) occurred, [E, E]."""
    return torch.bincount(row_T * experts + column_T, minlength=experts**2).view(experts, experts)
