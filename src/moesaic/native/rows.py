"""Products of few rows with the matrices of their experts, on tensors; rows.cpp computes them.

Shape legend: T tokens, R rows, E experts, O outputs and I inputs of a matrix, D width, G and H the hidden
width before and after the activation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.native import library
from moesaic.native.library import kernel, numbers

# Rows for each matrix up to which these are faster than PyTorch's products on a Zen 4: 512 matrices of
# 256 x 512 take 14.9 ms against 22.8 batched with 8 rows of float32, 6.9 against 11.9 with 4 of bfloat16;
# with 16 rows they lose, 32 against 26 and 29 against 16.
_FEW = {torch.float32: 8, torch.bfloat16: 4, torch.int8: 4}
_KINDS = ("swiglu", "relu", "gelu", "relu2")  # the order of rows.cpp's Kind


@dataclass(frozen=True)
class Stack:
    """A matrix [O, I] for each expert, float32 or bfloat16, perhaps with a bias of the same dtype; or int8,
    one step of which is ``scale_EO``, with a float32 bias. All contiguous."""

    matrix_EOI: Tensor
    bias_EO: Tensor | None = None
    scale_EO: Tensor | None = None

    def pointers(self) -> tuple[int, int | None, int | None]:
        """Of the matrices, the scales and the biases, in the order of rows.cpp."""
        scale, bias = self.scale_EO, self.bias_EO
        return (
            self.matrix_EOI.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
        )


@dataclass(frozen=True)
class Rows:
    """Which rows are whose: ``hit`` lists the experts that have any, ``ends`` the row after the last of
    each."""

    hit: Sequence[int]
    ends: Sequence[int]

    def few(self, matrix_EOI: Tensor) -> bool:
        """Whether these are rows for the kernels: few for each of the matrices, which lie in main memory."""
        most = _FEW.get(matrix_EOI.dtype, 0) * len(self.hit)
        here = matrix_EOI.device.type == "cpu" and matrix_EOI.is_contiguous()
        return len(self.hit) > 0 and self.ends[-1] <= most and here and library.available()


def products(x_RI: Tensor, stack: Stack, rows: Rows) -> Tensor:
    """Each row times the transpose of its expert's matrix, plus that expert's bias; float32 [R, O]."""
    _, O, I = stack.matrix_EOI.shape
    x_RI, out_RO = x_RI.float().contiguous(), torch.empty(len(x_RI), O)
    run = kernel(f"products_{_name(stack.matrix_EOI)}", 10)
    run(x_RI.data_ptr(), *stack.pointers(), out_RO.data_ptr(), *_numbers(rows), O, I)
    return out_RO


def transposed_products(x_RO: Tensor, matrix_EOI: Tensor, rows: Rows) -> Tensor:
    """Each row times its expert's matrix, float32 or bfloat16; float32 [R, I]."""
    _, O, I = matrix_EOI.shape
    x_RO, out_RI = x_RO.float().contiguous(), torch.empty(len(x_RO), I)
    run = kernel(f"transposed_{_name(matrix_EOI)}", 8)
    run(x_RO.data_ptr(), matrix_EOI.data_ptr(), out_RI.data_ptr(), *_numbers(rows), O, I)
    return out_RI


def outer_products(dy_RO: Tensor, x_RI: Tensor, grad_EOI: Tensor, ends_E: Sequence[int]) -> None:
    """Write each expert's sum over its rows of dy ⊗ x into its slice of ``grad_EOI``, float32 or bfloat16;
    zero where it has none. ``ends_E`` are those of every expert."""
    E, O, I = grad_EOI.shape
    dy_RO, x_RI = dy_RO.float().contiguous(), x_RI.float().contiguous()
    run = kernel(f"outer_{_name(grad_EOI)}", 7)
    run(dy_RO.data_ptr(), x_RI.data_ptr(), grad_EOI.data_ptr(), numbers(ends_E), E, O, I)


def experts(
    x_TD: Tensor, order_R: Tensor, weight_TK: Tensor, first: Stack, down: Stack, rows: Rows, kind: str
) -> Tensor:
    """The weighted sum of each token's experts, float32 [T, D], without gradients. Row r is choice
    ``order_R[r]`` (int64) of the T·K, or T·K for nobody's. Nothing is rounded between the two matrices."""
    x_TD, weight_TK = x_TD.float().contiguous(), weight_TK.float().contiguous()
    y_TD = torch.empty_like(x_TD)
    (T, D), (_, G, _), H = x_TD.shape, first.matrix_EOI.shape, down.matrix_EOI.shape[2]
    room = torch.empty(len(order_R) * (2 * D + G + H))
    kernel(f"experts_{_name(first.matrix_EOI)}", 20)(
        x_TD.data_ptr(),
        order_R.data_ptr(),
        weight_TK.data_ptr(),
        y_TD.data_ptr(),
        *first.pointers(),
        *down.pointers(),
        *_numbers(rows),
        _KINDS.index(kind),
        *(T, weight_TK.shape[1], D, G, H),
        room.data_ptr(),
    )
    return y_TD


def _name(matrix: Tensor) -> str:
    return str(matrix.dtype).removeprefix("torch.")


def _numbers(rows: Rows) -> tuple[object, object, int]:
    return numbers(rows.hit), numbers(rows.ends), len(rows.hit)
