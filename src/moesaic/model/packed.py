"""Weights laid out once for decoding on CPU, in place of being laid out again at every call.

One token is a product with one row, which is as fast as its weights are read. ``F.linear`` in bf16 rearranges
the matrix for oneDNN at each call; packed, it is read as it lies. int8 has half the bytes to read: each
output's row is stored in steps of 1/127 of its largest weight. A packed model computes and does nothing else:
its matrices cannot be trained or saved.

Shape legend: R rows, E experts, D width, I and O what goes into and comes out of a product.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.errors import RecipeError
from moesaic.model.dispatch import Dispatch
from moesaic.model.experts import Experts, activate
from moesaic.model.transformer import LanguageModel

Layout = Literal["packed", "int8"]


def pack(model: LanguageModel, layout: Layout) -> LanguageModel:
    """Lay out every matrix of ``model`` for decoding, in place, one at a time; returns the model.

    Routers, norms and embeddings stay as they are. Raises RecipeError off the CPU, for bfloat16 models on a
    machine without oneDNN, and for int8 where a matrix does not divide into blocks of 16.
    """
    if model.lm_head.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise RecipeError("weights are packed for CPUs with oneDNN only; leave --weights out")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child.out_features > 1:
                setattr(module, name, PackedLinear(child.weight.detach(), child.bias, layout))
            elif isinstance(child, Experts):
                setattr(module, name, PackedExperts(child, layout))
    return model.eval()


class PackedLinear(nn.Module):
    """x Wᵀ + b with W laid out as ``layout`` says; the result has the dtype of x. ``weight`` stands for the
    device only."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, layout: Layout) -> None:
        super().__init__()
        self.bias = None if bias_O is None else bias_O.detach()
        self.weight = weight_OI.new_empty(0)
        self.layout = layout
        if layout == "packed":
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
            return
        if weight_OI.shape[1] % 16 or weight_OI.shape[0] % 4:
            raise RecipeError(f"int8 weights need multiples of 16, not {list(weight_OI.shape)}; use packed")
        scale_O = weight_OI.abs().amax(1).float().div_(127).clamp_(min=1e-12)
        self.packed = (weight_OI / scale_O[:, None]).round_().to(torch.int8)
        self.scale_O = scale_O.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.layout == "packed":
            y = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
            return y
        # The kernel for AVX-512 takes bfloat16 rows only.
        y = torch._weight_int8pack_mm(x.reshape(-1, x.shape[-1]).bfloat16(), self.packed, self.scale_O)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


class PackedExperts(nn.Module):
    """A bank of experts for inference, behind the contract of ``Experts``; one without rows is not read."""

    def __init__(self, bank: Experts, layout: Layout) -> None:
        super().__init__()
        biases = (bank.up_bias, bank.down_bias)
        up, down = (None if bias is None else bias.detach() for bias in biases)
        self.kind = bank.kind
        self.first = nn.ModuleList(
            PackedLinear(matrix, None if up is None else up[e], layout)
            for e, matrix in enumerate(bank.first_matrix.detach())
        )
        self.down = nn.ModuleList(
            PackedLinear(matrix, None if down is None else down[e], layout)
            for e, matrix in enumerate(bank.down_proj.detach())
        )

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        return counts_E

    def forward(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, dropout: float = 0.0) -> Tensor:
        """As ``Experts.forward``, without gradients or dropout."""
        x_RD = x_TD.index_select(0, dispatch.token_R)
        y_RD = torch.empty_like(x_RD)
        used = [e for e, count in enumerate(dispatch.counts_E) if count]
        counts = [dispatch.counts_E[e] for e in used]
        for e, x, y in zip(used, x_RD.split(counts), y_RD.split(counts), strict=True):
            y.copy_(self.down[e](activate(self.first[e](x), self.kind)))
        return dispatch.combine(y_RD.mul_(dispatch.weight_R(weight_TK).to(y_RD.dtype)[:, None]))
