"""Weights laid out once for decoding on CPU, in place of being laid out again at every call.

One token is a product with one row, which is as fast as its weights are read. ``F.linear`` in bf16 rearranges
the matrix for oneDNN at each call; the kernels of native/rows.cpp read it as it lies, and where those cannot
be compiled it is rearranged once. int8 has half the bytes to read: each output's row is stored in steps of
1/127 of its largest weight. A packed model computes and does nothing else: its matrices cannot be trained or
saved.

Shape legend: R rows, E experts, D width, I and O what goes into and comes out of a product.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.errors import RecipeError
from moesaic.model.dispatch import Dispatch
from moesaic.model.experts import Experts, activate
from moesaic.model.routers import Router
from moesaic.model.transformer import LanguageModel
from moesaic.native import library
from moesaic.native.rows import Rows, Stack, products
from moesaic.native.rows import experts as few_experts

Layout = Literal["packed", "int8"]


def pack(model: LanguageModel, layout: Layout) -> LanguageModel:
    """Lay out every matrix of ``model`` for decoding, in place, one at a time; returns the model.

    Norms and embeddings stay as they are. Raises RecipeError off the CPU, and on a machine without oneDNN.
    """
    if model.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise RecipeError("weights are packed for CPUs with oneDNN only; leave --weights out")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.out_features > 1:
                setattr(module, name, PackedLinear(child.weight.detach(), child.bias, layout))
            elif isinstance(child, Experts) and (layout == "int8" or not library.available()):
                setattr(module, name, PackedExperts(child, layout))
            elif isinstance(child, Router):
                child.float()  # what it computes in
    return model.eval()


class PackedLinear(nn.Module):
    """x Wᵀ + b with W laid out as ``layout`` says; the result has the dtype of x. ``weight`` stands for the
    device only."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self.weight = weight_OI.new_empty(0)
        self.matrices = PackedMatrices(weight_OI[None], None if bias_O is None else bias_O[None], layout)

    def forward(self, x: Tensor) -> Tensor:
        x_RI = x.reshape(-1, x.shape[-1])
        y_RO: Tensor = self.matrices(x_RI, Rows([0], [len(x_RI)]))
        return y_RO.view(*x.shape[:-1], -1)


class PackedExperts(nn.Module):
    """A bank of experts for inference, behind the contract of ``Experts``; one without rows is not read."""

    def __init__(self, bank: Experts, layout: Layout) -> None:
        super().__init__()
        self.kind = bank.kind
        self.first = PackedMatrices(bank.first_matrix, bank.up_bias, layout)
        self.down = PackedMatrices(bank.down_proj, bank.down_bias, layout)

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        return counts_E

    def forward(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, dropout: float = 0.0) -> Tensor:
        """As ``Experts.forward``, without gradients or dropout."""
        rows, first, down = dispatch.rows, self.first.stack, self.down.stack
        if rows.few(first.matrix_EOI):
            return few_experts(x_TD, dispatch.order_R, weight_TK, first, down, rows, self.kind).to(x_TD.dtype)
        z_RG = self.first(x_TD.index_select(0, dispatch.token_R), rows)
        y_RD = self.down(activate(z_RG, self.kind), rows)
        return dispatch.combine(y_RD.mul_(dispatch.weight_R(weight_TK).to(y_RD.dtype)[:, None]))


class PackedMatrices(nn.Module):
    """The matrices of a bank, or one that every row goes through."""

    def __init__(self, matrix_EOI: Tensor, bias_EO: Tensor | None, layout: Layout) -> None:
        super().__init__()
        matrix_EOI, bias_EO = matrix_EOI.detach(), None if bias_EO is None else bias_EO.detach()
        self.rearranged: list[Tensor] = []
        self.stack = Stack(matrix_EOI.contiguous(), bias_EO)
        if layout == "int8":
            scale_EO = matrix_EOI.abs().amax(2).float().div_(127).clamp_(min=1e-12)
            steps_EOI = torch.empty(matrix_EOI.shape, dtype=torch.int8)
            for steps, matrix, scale in zip(steps_EOI, matrix_EOI, scale_EO, strict=True):
                steps.copy_((matrix / scale[:, None]).round_())
            self.stack = Stack(steps_EOI, None if bias_EO is None else bias_EO.float(), scale_EO)
        elif not library.available():
            self.rearranged = [torch.ops.mkldnn._reorder_linear_weight(matrix) for matrix in matrix_EOI]
            self.stack = Stack(matrix_EOI.new_empty(0), bias_EO)

    def forward(self, x_RI: Tensor, rows: Rows) -> Tensor:
        """Each row times the transpose of its expert's matrix, plus that expert's bias; of the dtype of x."""
        if rows.few(self.stack.matrix_EOI):
            return products(x_RI, self.stack, rows).to(x_RI.dtype)
        sizes = [end - begin for begin, end in zip([0, *rows.ends], rows.ends, strict=False)]
        parts = [self._one(x, e) for x, e in zip(x_RI.split(sizes), rows.hit, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one(self, x_RI: Tensor, e: int) -> Tensor:
        bias_O = None if self.stack.bias_EO is None else self.stack.bias_EO[e]
        if self.rearranged:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x_RI, self.rearranged[e], bias_O, "none", [], "")
            return y
        matrix_OI, scale_EO = self.stack.matrix_EOI[e], self.stack.scale_EO
        if scale_EO is None:
            return F.linear(x_RI, matrix_OI, bias_O)
        if matrix_OI.shape[1] % 16 or matrix_OI.shape[0] % 4:  # not for PyTorch's kernel
            y = F.linear(x_RI.float(), matrix_OI * scale_EO[e, :, None])
        else:  # which takes bfloat16 rows only
            y = torch._weight_int8pack_mm(x_RI.bfloat16(), matrix_OI, scale_EO[e].bfloat16()).float()
        return (y if bias_O is None else y + bias_O).to(x_RI.dtype)
