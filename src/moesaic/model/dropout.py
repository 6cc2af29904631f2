"""Dropout from few random bits.

PyTorch's CPU dropout draws a 64-bit number per element, one element after the other: 30 ms of makeMoE's
step. Sixteen bits decide as well (the probability is met to 1/65,536) and come four to a draw.
"""

import math
from collections.abc import Sequence

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
    return x * kept(x.shape, p).to(x.dtype).mul_(1 / (1 - p))


def kept(shape: Sequence[int], p: float, device: str = "cpu") -> Tensor:
    """Which elements a dropout of probability ``p`` leaves, bool of ``shape``, from the global generator."""
    if device != "cpu":
        return torch.rand(shape, device=device) >= p
    size = math.prod(shape)
    draws = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    bits = draws.view(torch.int16)[:size].view(shape)
    # Bits are uniform in [−32768, 32767]; those at or above the threshold keep their element.
    return bits >= round(p * 65_536) - 32_768
