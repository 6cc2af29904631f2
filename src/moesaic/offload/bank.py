"""A bank of experts of which only those in use are in memory, behind the contract of ``Experts``.

The matrices of the experts that a batch hits are gathered out of the slots, a chunk of experts at a time,
while the next chunk is read. Gradients stay factors (factors.py).

Shape legend: T tokens, K choices per token, R rows (token-expert pairs, sorted by expert), U experts of a
chunk, D width, H and G the hidden width after and before the activation.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesaic.errors import RecipeError
from moesaic.model.dispatch import Dispatch, rows_of
from moesaic.model.experts import FFNKind, activate, activate_backward
from moesaic.model.grouped import Group, fill
from moesaic.native.rows import Stack
from moesaic.native.rows import experts as few_experts
from moesaic.offload.factors import Factors
from moesaic.offload.records import ExpertShape, Matrices

_FEW, _FILLED = 4, 16  # rows


class Source(Protocol):
    """Where matrices come from."""

    shape: ExpertShape
    chunk: int  # experts to gather at once
    kept: int  # experts of a layer whose matrices may be held until its backward pass
    experts: int  # of a layer
    last: list[list[int]]  # of each layer, the chunk that its forward pass ended with

    def gather(
        self, layer: int, experts: Sequence[int], dtype: torch.dtype, *, keep: bool = False
    ) -> Matrices:
        """Matrices of ``chunk`` experts at most as they are now, float32 or bfloat16; good until the next
        call, which writes over them, or with ``keep`` for as long as they are held."""
        ...

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """Experts that will be gathered next."""
        ...

    def close(self) -> None:
        """Give back what it holds; nothing can be gathered then."""
        ...


class OffloadedExperts(nn.Module):
    """One layer's bank. ``factors`` are the gradients since ``take_factors`` was last called."""

    def __init__(self, source: Source, layer: int, trains: bool = True) -> None:
        super().__init__()
        self.source, self.layer = source, layer
        self.kind: FFNKind = source.shape.kind
        self.factors: list[Factors] = []
        self.trains = trains

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        """How many rows the caller should lay out for each expert. In float32 as many as a bank in memory
        would; in bfloat16 a multiple of 16, unless they are few: oneDNN compiles a kernel for every number of
        rows that it meets, half a millisecond each."""
        if not torch.is_autocast_enabled("cpu"):
            return fill(counts_E, self.source.shape.hidden * self.source.shape.width, torch.float32)
        return [count if count <= _FEW else -(-count // _FILLED) * _FILLED for count in counts_E]

    def take_factors(self) -> list[Factors]:
        """The gradients so far, which are then forgotten."""
        factors, self.factors = self.factors, []
        return factors

    def forward(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, dropout: float = 0.0) -> Tensor:
        """As ``Experts.forward``. Raises RecipeError for dropout and off the CPU."""
        if dropout or x_TD.device.type != "cpu":
            raise RecipeError("experts on disk are computed on the CPU and without model.dropout")
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TD.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            dtype = torch.float32
        if not torch.is_grad_enabled() and dispatch.rows.few(torch.empty(0, dtype=dtype)):
            return self._few(x_TD.to(dtype), weight_TK, dispatch).to(x_TD.dtype)
        learn = torch.is_grad_enabled() and self.training and self.trains
        # A gradient comes back here only if something that goes in asks for one; this does.
        anchor = torch.zeros((), requires_grad=learn)
        with torch.autocast("cpu", enabled=False):
            out: Tensor = _Offloaded.apply(x_TD.to(dtype), weight_TK, anchor, dispatch, self, learn)  # type: ignore[no-untyped-call]
        return out.to(x_TD.dtype)

    def _few(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch) -> Tensor:
        """The same for few rows of each expert and without gradients, by the kernels that decode a bank in
        memory; float32."""
        y_TD = torch.zeros(x_TD.shape)
        for experts, counts, rows in _chunks(dispatch, self.source.chunk):
            first, down = self.source.gather(self.layer, experts, x_TD.dtype)
            own, order_R = rows_of(counts), dispatch.order_R[rows]
            y_TD += few_experts(x_TD, order_R, weight_TK, Stack(first), Stack(down), own, self.kind)
        return y_TD


def _chunks(dispatch: Dispatch, size: int) -> Iterator[tuple[list[int], list[int], slice]]:
    """The experts that have rows, some at a time: experts, their counts, their rows."""
    hit, ends = dispatch.rows.hit, dispatch.rows.ends
    for start in range(0, len(hit), size):
        end = min(start + size, len(hit))
        first = ends[start - 1] if start else 0
        counts = [b - a for a, b in zip([first, *ends[start : end - 1]], ends[start:end], strict=True)]
        yield list(hit[start:end]), counts, slice(first, ends[end - 1])


class _Offloaded(torch.autograd.Function):
    """The experts' FFNs as one autograd node, as in experts.py; weights have no gradient here but factors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        anchor: Tensor,
        dispatch: Dispatch,
        bank: OffloadedExperts,
        learn: bool,
    ) -> Tensor:
        shape, R = bank.source.shape, len(dispatch.order_R)
        z_RG, y_RD = x_TD.new_empty(R, shape.inner), x_TD.new_empty(R, shape.width)
        weight_R1 = dispatch.weight_R(weight_TK).to(x_TD.dtype)[:, None]
        chunks, kept = list(_chunks(dispatch, bank.source.chunk)), []
        keep = any(ctx.needs_input_grad) and len(dispatch.rows.hit) <= bank.source.kept
        for number, (experts, counts, rows) in enumerate(chunks):
            first, down = bank.source.gather(bank.layer, experts, x_TD.dtype, keep=keep)
            kept += [(first, down)] * keep
            if number + 1 < len(chunks):
                bank.source.prefetch(bank.layer, chunks[number + 1][0])
            group = Group(slice(0, len(experts)), slice(0, sum(counts)), counts, x_TD.device, dispatch.layer)
            z = group.products(x_TD[dispatch.token_R[rows]], first.mT, None, z_RG[rows])
            if bank.kind in ("relu", "relu2"):
                z.relu_()
            a = z if bank.kind == "relu" else activate(z, bank.kind)
            group.products(a, down.mT, None, y_RD[rows]).mul_(weight_R1[rows])
        bank.source.last[bank.layer] = chunks[-1][0] if chunks else []
        ctx.save_for_backward(x_TD, weight_TK, z_RG)
        ctx.dispatch, ctx.bank, ctx.chunks, ctx.learn, ctx.kept = dispatch, bank, chunks, learn, kept
        return dispatch.combine(y_RD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, z_RG = ctx.saved_tensors
        dispatch, bank, chunks, kind = ctx.dispatch, ctx.bank, ctx.chunks, ctx.bank.kind
        shape, R = bank.source.shape, len(z_RG)
        weight_R1 = dispatch.weight_R(weight_TK).to(x_TD.dtype)[:, None]
        d_weight_R = torch.zeros(R, dtype=weight_TK.dtype)
        dx_RD, x_RD = x_TD.new_empty(R, shape.width), x_TD.new_empty(R, shape.width)
        dz_RG, a_RH = torch.empty_like(z_RG), x_TD.new_empty(R, shape.hidden)
        dy_RD = dy_TD.to(x_TD.dtype).index_select(0, dispatch.token_R)
        for number, (experts, counts, rows) in reversed(list(enumerate(chunks))):
            first, down = ctx.kept.pop() if ctx.kept else bank.source.gather(bank.layer, experts, x_TD.dtype)
            if number:
                bank.source.prefetch(bank.layer, chunks[number - 1][0])
            elif bank.layer:  # the layer below is the next to want its experts
                bank.source.prefetch(bank.layer - 1, bank.source.last[bank.layer - 1])
            group = Group(slice(0, len(experts)), slice(0, sum(counts)), counts, x_TD.device, dispatch.layer)
            z, weight_1, dy = z_RG[rows], weight_R1[rows], dy_RD[rows]
            a = z if kind == "relu" else activate(z, kind)
            da = group.products(dy, down)
            d_weight_R[rows] = (da * a).sum(-1, dtype=weight_TK.dtype)
            a_RH[rows] = a
            dz = activate_backward(da, z, kind)
            dy *= weight_1
            dz_RG[rows] = dz
            group.products(dz, first, None, dx_RD[rows]).mul_(weight_1)
            x_RD[rows] = x_TD[dispatch.token_R[rows]].mul_(weight_1)
        if ctx.learn:
            experts = [expert for chosen, _, _ in chunks for expert in chosen]
            counts = [count for _, each, _ in chunks for count in each]
            bank.factors.append(Factors(experts, counts, dispatch.layer, x_RD, dz_RG, a_RH, dy_RD))
        dx_TD = dispatch.combine(dx_RD) if ctx.needs_input_grad[0] else None
        d_weight_TK = dispatch.weight_gradient(d_weight_R) if ctx.needs_input_grad[1] else None
        return dx_TD, d_weight_TK, None, None, None, None
