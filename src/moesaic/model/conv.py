"""A short causal convolution before attention and before the feed-forward network.

Attention can look at the token before, but must learn to; this lets each layer simply take it. What it is
worth on Tiny Shakespeare is in docs/evidence.md.

Shape legend: B batch, T positions, D width, K kernel size.
"""

from typing import Any

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    """y[t] = x[t] + Σ_i weight[i] · x[t − i], i < K, each feature by itself; the identity at first.

    The canon layer of Allen-Zhu 2025 (arXiv 2512.17351, section 4), there at its points A and C.
    Primer (arXiv 2109.08668) has the like after the projections of attention.
    """

    def __init__(self, kernel: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(kernel, width))

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None, before_BJD: Tensor | None) -> Tensor:
        """Mix ``x_BTD``, whose padding (``real_BT`` False) counts as zeros.

        ``before_BJD`` holds the K − 1 positions before this call, zeros at the start of a text, and
        is moved on in place; None means that there is nothing before and nothing to remember.
        """
        if real_BT is not None:
            x_BTD = x_BTD * real_BT[..., None]
        if before_BJD is None:
            y_BTD: Tensor = _Mix.apply(x_BTD, self.weight)  # type: ignore[no-untyped-call]
            return y_BTD
        J = before_BJD.shape[1]
        all_BSD = torch.cat([before_BJD.to(x_BTD.dtype), x_BTD], dim=1)
        before_BJD.copy_(all_BSD[:, all_BSD.shape[1] - J :])
        y_BSD: Tensor = _Mix.apply(all_BSD, self.weight)  # type: ignore[no-untyped-call]
        return y_BSD[:, J:]


class _Mix(torch.autograd.Function):
    """As one node: PyTorch's depthwise conv1d wants the positions last, and copies twice for it."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_KD: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_KD)
        scale_KD = weight_KD.to(x_BTD.dtype)
        y_BTD = x_BTD * (1 + scale_KD[0])
        for i in range(1, min(len(scale_KD), x_BTD.shape[1])):
            y_BTD[:, i:].addcmul_(x_BTD[:, :-i], scale_KD[i])
        return y_BTD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BTD: Tensor) -> tuple[Tensor, Tensor]:
        x_BTD, weight_KD = ctx.saved_tensors
        scale_KD = weight_KD.to(x_BTD.dtype)
        dx_BTD = dy_BTD * (1 + scale_KD[0])
        d_weight_KD = torch.zeros_like(weight_KD)
        for i in range(min(len(scale_KD), x_BTD.shape[1])):
            late_BTD, early_BTD = dy_BTD[:, i:], x_BTD[:, : x_BTD.shape[1] - i]
            d_weight_KD[i] = (late_BTD * early_BTD).sum((0, 1))  # in float32, whatever it is given back in
            if i:
                dx_BTD[:, :-i].addcmul_(late_BTD, scale_KD[i])
        return dx_BTD, d_weight_KD
