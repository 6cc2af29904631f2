"""AdamW on bfloat16 matrices and on records of experts, on tensors; adamw.cpp computes it.

Shape legend: S slots, B bytes of a record, U experts at work, D width, G and H the hidden width before and
after the activation.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moesaic.native.library import kernel, numbers

_MOST_PUSHES = 3  # as in adamw.cpp, and as many as offload/catch_up.py makes
_FLOATS = 4 + 2 * _MOST_PUSHES + 8


@dataclass(frozen=True)
class Scalars:
    """What one expert is multiplied by and pushed by to catch up, and the constants of a step."""

    keep: float = 1.0
    first: float = 1.0
    second: float = 1.0
    pushes: Sequence[tuple[float, float]] = ()
    decay: float = 1.0
    beta1: float = 1.0
    beta2: float = 1.0
    eps: float = 1.0
    rate: float = 0.0  # over the first moment's correction
    root: float = 1.0  # of the second moment's correction
    scale: float = 1.0
    seed: int = 0

    def floats(self) -> np.ndarray:
        """In the order of adamw.cpp."""
        pushes = self.pushes
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
    gradients: tuple[Tensor, Tensor],
) -> None:
    """Catch up and make a step, in place. ``kinds`` are the layout's of weights and moments; ``gradients``
    are those of the first matrices [U, G, D] and of the last [U, D, H], float32 or bfloat16, contiguous."""
    name = _name(gradients[0])
    kernel(f"adamw_{kinds[0]}_{kinds[1]}_{name}", 9)(
        *_records(records_SB, slots, scalars), *_stacks(gradients)
    )


def gather(
    records_SB: Tensor,
    slots: Sequence[int],
    kinds: tuple[str, str],
    scalars: Sequence[Scalars],
    out: tuple[Tensor, Tensor],
) -> None:
    """Write the first and last matrices, as they are once caught up, into stacks like those of ``update``;
    the records stay as they are."""
    kernel(f"gather_{kinds[0]}_{kinds[1]}_{_name(out[0])}", 9)(
        *_records(records_SB, slots, scalars), *_stacks(out)
    )


def master_step(
    weight: Tensor, gradient: Tensor, master: Tensor, first: Tensor, second: Tensor, scalars: Scalars
) -> None:
    """One step of AdamW on ``master`` with a bfloat16 gradient, rounded into the bfloat16 ``weight``; all of
    one shape and contiguous."""
    table = scalars.floats()
    pointers = (tensor.data_ptr() for tensor in (weight, gradient, master, first, second))
    kernel("adamw_master", 7)(*pointers, weight.numel(), table.ctypes.data)


def squared_norm(values: Tensor) -> float:
    """The sum of squares of bfloat16 numbers, contiguous, without a float32 copy of them."""
    total = np.zeros(1)
    kernel("squares_bfloat16", 3)(values.data_ptr(), values.numel(), total.ctypes.data)
    return float(total[0])


_Words = tuple[Any, ...]


def _records(records_SB: Tensor, slots: Sequence[int], scalars: Sequence[Scalars]) -> _Words:
    table = np.stack([one.floats() for one in scalars])
    address = table.ctypes.data_as(ctypes.c_void_p)  # keeps the table as long as itself
    return records_SB.data_ptr(), numbers(slots), len(slots), records_SB.stride(0), address


def _stacks(stacks: tuple[Tensor, Tensor]) -> _Words:
    first, down = stacks
    return first.data_ptr(), down.data_ptr(), first[0].numel(), down[0].numel()


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
