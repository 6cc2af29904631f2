"""Dropout from few random bits.

PyTorch's CPU dropout draws a 64-bit number per element, one element after the other: 30 ms of makeMoE's
step. Sixteen bits decide as well (the probability is met to 1/65,536) and come four to a draw.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability ``p`` and scale the rest by 1/(1 − p) while ``training``
    (Srivastava et al. 2014), from torch's global generator."""
    if not training or p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[: x.numel()].view(x.shape)
    # Bits are uniform in [−32768, 32767]; those at or above the threshold keep their element.
    keep = bits >= round(p * 65_536) - 32_768
    return x * keep.to(x.dtype).mul_(1 / (1 - p))
