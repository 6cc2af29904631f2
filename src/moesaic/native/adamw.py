"""AdamW on records of experts, on tensors; adamw.cpp computes it.

Shape legend: S slots, U experts at work, P parameters of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moesaic.native.library import kernel, numbers

_MOST_PUSHES = 10  # as in adamw.cpp
_FLOATS = 4 + 2 * _MOST_PUSHES + 8


@dataclass(frozen=True)
class Scalars:
    """What one expert is multiplied by and pushed by to catch up, and the constants of a step."""

    keep: float
    first: float
    second: float
    pushes: Sequence[tuple[float, float]]
    decay: float = 1.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 1.0
    rate: float = 0.0  # over the first moment's correction
    root: float = 1.0  # of the second moment's correction
    scale: float = 1.0
    seed: int = 0

    def floats(self) -> np.ndarray:
        """In the order of adamw.cpp. Spans double in length, so ten hold a thousand steps; a push after that
        is nothing."""
        pushes = list(self.pushes)[:_MOST_PUSHES]
        row = np.zeros(_FLOATS, np.float32)
        row[:4] = self.keep, self.first, self.second, len(pushes)
        for n, (push, eps) in enumerate(pushes):
            row[4 + n], row[4 + _MOST_PUSHES + n] = push, eps
        end = (self.decay, self.beta1, self.beta2, self.eps, self.rate, self.root, self.scale)
        row[-8:-1] = end
        row[-1:] = np.array([self.seed % 2**32], np.uint32).view(np.float32)
        return row


def update(
    records_SB: Tensor,
    slots: Sequence[int],
    kinds: tuple[str, str],
    scalars: Sequence[Scalars],
    gradient_UP: Tensor,
) -> None:
    """Catch up and make a step, in place. ``kinds`` are the layout's of weights and moments."""
    gradient_UP = gradient_UP.contiguous()
    table = np.stack([one.floats() for one in scalars])
    kernel(f"adamw_{kinds[0]}_{kinds[1]}", 7)(
        *(records_SB.data_ptr(), numbers(slots), len(slots), records_SB.stride(0), gradient_UP.shape[1]),
        *(table.ctypes.data, gradient_UP.data_ptr()),
    )


def gather(
    records_SB: Tensor,
    slots: Sequence[int],
    kinds: tuple[str, str],
    scalars: Sequence[Scalars],
    parameters: int,
    dtype: torch.dtype,
) -> Tensor:
    """Weights [U, P] as they are once caught up, float32 or bfloat16; the records stay as they are."""
    out = torch.empty(len(slots), parameters, dtype=dtype)
    table = np.stack([one.floats() for one in scalars])
    name = str(dtype).removeprefix("torch.")
    kernel(f"gather_{kinds[0]}_{kinds[1]}_{name}", 7)(
        *(records_SB.data_ptr(), numbers(slots), len(slots), records_SB.stride(0), parameters),
        *(table.ctypes.data, out.data_ptr()),
    )
    return out
