"""Gradients of experts as the two factors that they are products of.

A matrix whose expert saw n tokens has a gradient of rank n: dW = dy^T x over n rows. Kept are the rows; the
product is made when the optimizer needs it, and its norm without making it.

Shape legend: R rows, of which each expert owns some, one after the other; D width, H and G the hidden width
after and before the activation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from moesaic.model.dispatch import Layer
from moesaic.model.grouped import Group
from moesaic.native import grams, library
from moesaic.offload.records import Matrices


@dataclass(frozen=True)
class Factors:
    """The gradient of an expert's first matrix is dz^T x over its rows, that of its last dy^T a.

    ``experts`` are sorted; the first owns the first ``counts[0]`` rows, and so on."""

    experts: list[int]
    counts: list[int]
    layer: Layer  # of which these are all rows or some
    x_RD: Tensor
    dz_RG: Tensor
    a_RH: Tensor
    dy_RD: Tensor

    def rows(self, start: int, end: int) -> "Factors":
        """Of the experts number ``start`` to ``end``."""
        first, last = sum(self.counts[:start]), sum(self.counts[:end])
        parts = (t[first:last] for t in (self.x_RD, self.dz_RG, self.a_RH, self.dy_RD))
        return Factors(self.experts[start:end], self.counts[start:end], self.layer, *parts)

    def chunks(self, size: int) -> Iterator["Factors"]:
        """So many experts at a time."""
        for start in range(0, len(self.experts), size):
            yield self.rows(start, min(start + size, len(self.experts)))

    def write_gradients(self, out: Matrices) -> None:
        """Write the gradients themselves into stacks of as many experts."""
        first, down = out
        rows = slice(0, len(self.x_RD))
        group = Group(slice(0, len(first)), rows, self.counts, self.x_RD.device, self.layer)
        group.outer_products(self.dz_RG, self.x_RD, first)
        group.outer_products(self.dy_RD, self.a_RH, down)

    def squared_norm(self) -> float:
        """The sum of squares of all gradients, none of which is made for it: that of dz^T x is the sum of
        (x x^T) * (dz dz^T)."""
        pairs = ((self.dz_RG, self.x_RD), (self.dy_RD, self.a_RH))
        if library.available():
            ends = list(accumulate(self.counts))
            return sum(grams.squared_norms(left, right, ends) for left, right in pairs)
        total = torch.zeros((), dtype=torch.float64)
        for left_R, right_R in pairs:
            for parts in zip(
                left_R.float().split(self.counts), right_R.float().split(self.counts), strict=True
            ):
                one, other = (rows @ rows.mT for rows in parts)
                total += (one * other).sum(dtype=torch.float64)
        return float(total)


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
    return Factors(experts, counts, Layer.of(counts), *(torch.cat(column)[order] for column in columns))
