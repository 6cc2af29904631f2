"""A small change of every expert's matrix, W_e + B_e A_e, computed as two thin products beside the large one.

Shape legend: E experts, r rank, I and O what goes into and comes out of a matrix; R rows of a group.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesaic.model.grouped import Group


class LowRank(NamedTuple):
    """The two factors; B has been scaled already."""

    a_ErI: Tensor
    b_EOr: Tensor

    def add(self, group: Group, x_RI: Tensor, out_RO: Tensor) -> None:
        """Add each row times its expert's change."""
        out_RO += group.products(group.products(x_RI, self.a_ErI.mT), self.b_EOr.mT)

    def add_back(self, group: Group, dy_RO: Tensor, dx_RI: Tensor) -> None:
        """Add the gradient that comes back through the change."""
        dx_RI += group.products(group.products(dy_RO, self.b_EOr), self.a_ErI)

    def write_gradients(self, group: Group, dy_RO: Tensor, x_RI: Tensor, gradient: "LowRank") -> None:
        """Write the experts' gradients of both factors into their slices of ``gradient``."""
        group.outer_products(dy_RO, group.products(x_RI, self.a_ErI.mT), gradient.b_EOr)
        group.outer_products(group.products(dy_RO, self.b_EOr), x_RI, gradient.a_ErI)

    def empty_like(self) -> "LowRank":
        return LowRank(torch.empty_like(self.a_ErI), torch.empty_like(self.b_EOr))


def low_rank(a_ErI: Tensor | None, b_EOr: Tensor | None) -> LowRank | None:
    """The change, if there is one."""
    return None if a_ErI is None or b_EOr is None else LowRank(a_ErI, b_EOr)


class ExpertAdapter(nn.Module):
    """What LoRA trains of a bank of experts: factors for its first matrix, for its last, or for both."""

    def __init__(self, first_EOI: Tensor | None, down_EOI: Tensor | None, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.first_a, self.first_b = _factors(first_EOI, rank)
        self.down_a, self.down_b = _factors(down_EOI, rank)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """A and scaled B of the first matrix, then of the last, in ``dtype``."""
        return (
            None if self.first_a is None else self.first_a.to(dtype),
            None if self.first_b is None else (self.first_b * self.scale).to(dtype),
            None if self.down_a is None else self.down_a.to(dtype),
            None if self.down_b is None else (self.down_b * self.scale).to(dtype),
        )


def _factors(matrix: Tensor | None, rank: int) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """A [.., r, I] as PyTorch begins a linear layer, B [.., O, r] zero, so that nothing changes at first;
    float32 whatever the matrix is."""
    if matrix is None:
        return None, None
    *experts, outputs, inputs = matrix.shape
    a = torch.empty(*experts, rank, inputs, device=matrix.device)
    nn.init.uniform_(a, -(inputs**-0.5), inputs**-0.5)
    return nn.Parameter(a), nn.Parameter(torch.zeros(*experts, outputs, rank, device=matrix.device))


class AdaptedLinear(nn.Linear):
    """A linear layer and its low-rank change: x Wᵀ + b + scale · x Aᵀ Bᵀ. Takes over the layer's
    parameters."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias, self.scale = layer.weight, layer.bias, scale
        a, b = _factors(layer.weight, rank)
        assert a is not None
        assert b is not None
        self.lora_a, self.lora_b = a, b

    def forward(self, x: Tensor) -> Tensor:
        thin = nn.functional.linear(x, self.lora_a)
        change: Tensor = nn.functional.linear(thin, self.lora_b)
        y: Tensor = super().forward(x)
        return y + change * self.scale
