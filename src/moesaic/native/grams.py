"""Norms of products of rows, on tensors; grams.cpp computes them.

Shape legend: R rows, I and J columns.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from moesaic.native.library import kernel, numbers


def squared_norms(left_RI: Tensor, right_RJ: Tensor, ends: Sequence[int]) -> float:
    """The sum over experts of the squared norm of left^T right over the expert's rows, none of which is made;
    ``ends`` are the rows after each expert's last. Float32 or bfloat16, both alike and contiguous."""
    total = np.zeros(1)
    kernel(f"squared_norms_{str(left_RI.dtype).removeprefix('torch.')}", 7)(
        *(left_RI.data_ptr(), left_RI.shape[1], right_RJ.data_ptr(), right_RJ.shape[1]),
        *(numbers(ends), len(ends), total.ctypes.data),
    )
    return float(total[0])
