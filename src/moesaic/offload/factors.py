"""Gradients of experts as the two factors that they are products of.

A matrix whose expert saw n tokens has a gradient of rank n: dW = dy^T x over n rows. Kept are the rows; the
product is made when the optimizer needs it, and its norm without making it.

Shape legend: R rows, of which each expert owns some, one after the other; U experts of a chunk; D width, H
and G the hidden width after and before the activation, P parameters of an expert.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moesaic.model.grouped import Group
from moesaic.offload.records import ExpertShape


@dataclass(frozen=True)
class Factors:
    """The gradient of an expert's first matrix is dz^T x over its rows, that of its last dy^T a.

    ``experts`` are sorted; the first owns the first ``counts[0]`` rows, and so on."""

    experts: list[int]
    counts: list[int]
    x_RD: Tensor
    dz_RG: Tensor
    a_RH: Tensor
    dy_RD: Tensor

    def rows(self, start: int, end: int) -> "Factors":
        """Of the experts number ``start`` to ``end``."""
        first, last = sum(self.counts[:start]), sum(self.counts[:end])
        parts = (t[first:last] for t in (self.x_RD, self.dz_RG, self.a_RH, self.dy_RD))
        return Factors(self.experts[start:end], self.counts[start:end], *parts)

    def chunks(self, size: int) -> Iterator["Factors"]:
        """So many experts at a time."""
        for start in range(0, len(self.experts), size):
            yield self.rows(start, min(start + size, len(self.experts)))

    def gradients(self, shape: ExpertShape) -> Tensor:
        """The gradients themselves, float32 [U, P]."""
        U, device = len(self.experts), self.x_RD.device
        group = Group(slice(0, U), slice(0, len(self.x_RD)), self.counts, device)
        first = self.x_RD.new_empty(U, shape.inner, shape.width)
        down = self.x_RD.new_empty(U, shape.width, shape.hidden)
        group.outer_products(self.dz_RG, self.x_RD, first)
        group.outer_products(self.dy_RD, self.a_RH, down)
        return torch.cat([first.flatten(1), down.flatten(1)], dim=1).float()

    def squared_norm(self) -> float:
        """The sum of squares of all gradients: that of dz^T x is the sum of (x x^T) * (dz dz^T)."""
        total = 0.0
        parts = zip(
            *(t.split(self.counts) for t in (self.x_RD, self.dz_RG, self.a_RH, self.dy_RD)), strict=True
        )
        for x, dz, a, dy in parts:
            x, dz, a, dy = x.float(), dz.float(), a.float(), dy.float()
            if len(x) == 1:
                first, down = (x.square().sum() * dz.square().sum(), a.square().sum() * dy.square().sum())
            else:
                first, down = ((x @ x.T) * (dz @ dz.T)).sum(), ((a @ a.T) * (dy @ dy.T)).sum()
            total += float(first + down)
        return total


def merged(parts: Sequence[Factors]) -> Factors:
    """The sum of gradients: an expert's rows of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    owned: dict[int, list[tuple[int, int, int]]] = {}
    for number, part in enumerate(parts):
        ends = list(accumulate(part.counts))
        for expert, count, end in zip(part.experts, part.counts, ends, strict=True):
            owned.setdefault(expert, []).append((number, end - count, end))
    experts = sorted(owned)
    starts = [0, *accumulate(len(part.x_RD) for part in parts)]
    order = torch.cat(
        [torch.arange(starts[n] + a, starts[n] + b) for expert in experts for n, a, b in owned[expert]]
    )
    counts = [sum(b - a for _, a, b in owned[expert]) for expert in experts]
    columns = zip(*((p.x_RD, p.dz_RG, p.a_RH, p.dy_RD) for p in parts), strict=True)
    return Factors(experts, counts, *(torch.cat(column)[order] for column in columns))
