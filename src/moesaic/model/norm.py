"""Normalisation whose mean square is float32, whatever the precision of the rest.

The residual stream is float32, so its norms are throughout; queries and keys in bf16 are scaled in bf16.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.native import norm as native


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4) over the last axis,
    computed in float32 and given back in the dtype that the next matrix product takes."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        if x.device.type == "cpu" and x.dtype != torch.float64:
            y: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
            return y
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm (Ba et al. 2016, arXiv 1607.06450) in float32, given back in the dtype that the
    next matrix product takes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(compute_dtype(x))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products run in here: autocast's, or the tensor's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _RMSNorm(torch.autograd.Function):
    """One autograd node where PyTorch composes this norm of many on CPU: by the kernels of native/norm.cpp,
    or else by few operations, which apply it in the input's precision (benchmarks/cpu_choices.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        if native.takes(x, dtype):
            x_RD = x.reshape(-1, x.shape[-1]).contiguous()
            y_RD, scale_R = native.rms_norm(x_RD, weight, eps, dtype)
            ctx.save_for_backward(x_RD, weight, scale_R)
            return y_RD.view(x.shape)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        y: Tensor = (x * scale).mul_(weight.to(x.dtype)).to(dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        if native.takes(x, dy.dtype) and scale.ndim == 1:
            dy_RD = dy.reshape(x.shape).contiguous()
            dx_RD, d_weight = native.rms_norm_backward(x, weight, scale, dy_RD)
            return dx_RD.view(dy.shape), d_weight.to(weight.dtype), None, None
        dy, scaler = dy.to(x.dtype), weight.to(x.dtype)
        unit = x * scale
        product = dy * unit
        # Summed in float32, then rounded; asked for as float32, the whole product would be copied first.
        d_weight = product.sum(dim=tuple(range(product.ndim - 1))).to(weight.dtype)
        mean = (product @ scaler).div_(x.shape[-1]).unsqueeze(-1)
        dx = (dy * scaler).sub_(unit.mul_(mean)).mul_(scale)
        return dx, d_weight, None, None
