"""RMSNorm of rows, on tensors; norm.cpp computes it.

Shape legend: R rows, D numbers of a row.
"""

import numpy as np
import torch
from torch import Tensor

from moesaic.native import library
from moesaic.native.library import kernel

_FLOAT, _HALF = torch.float32, torch.bfloat16


def takes(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this input and this dtype of the result."""
    known = (x.dtype, dtype) in ((_FLOAT, _FLOAT), (_FLOAT, _HALF), (_HALF, _HALF))
    return known and x.device.type == "cpu" and library.available()


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The rows, which are contiguous, over the root of their mean square and times ``weight_D``, in
    ``dtype``; and what each was multiplied by, float32 [R]."""
    R, D = x_RD.shape
    y_RD, scale_R = torch.empty(R, D, dtype=dtype), torch.empty(R)
    weight_D, least = weight_D.float().contiguous(), np.array([eps], np.float32)
    kernel(f"rms_norm_{_name(x_RD)}_{_name(y_RD)}", 7)(
        *(x_RD.data_ptr(), weight_D.data_ptr(), R, D, least.ctypes.data, y_RD.data_ptr(), scale_R.data_ptr())
    )
    return y_RD, scale_R


def rms_norm_backward(
    x_RD: Tensor, weight_D: Tensor, scale_R: Tensor, dy_RD: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows, in their dtype, and of the weight, float32 [D]; all contiguous."""
    R, D = x_RD.shape
    dx_RD, d_weight_D = torch.empty_like(x_RD), torch.empty(D)
    weight_D = weight_D.float().contiguous()
    given = (t.data_ptr() for t in (x_RD, weight_D, scale_R, dy_RD))
    run = kernel(f"rms_norm_backward_{_name(x_RD)}_{_name(dy_RD)}", 8)
    run(*given, R, D, dx_RD.data_ptr(), d_weight_D.data_ptr())
    return dx_RD, d_weight_D


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
