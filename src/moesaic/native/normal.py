"""Normal numbers that follow from a key and a place alone; normal.cpp computes them."""

import numpy as np
from numpy.typing import NDArray

from moesaic.native.library import kernel


def normal_numbers(
    count: int, table: NDArray[np.float32], seed: int, layer: int, expert: int
) -> NDArray[np.float32]:
    """``count`` of the 65,536 values of ``table``, chosen by Philox4x32-10 under ``seed`` at the counters
    (0 …, 0, expert, layer)."""
    out = np.empty(count, np.float32)
    kernel("normal_numbers", 6)(out.ctypes.data, count, table.ctypes.data, seed, layer, expert)
    return out
