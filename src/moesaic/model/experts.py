"""Feed-forward networks: one dense FFN, and a bank of experts behind one narrow contract.

A bank turns rows sorted by expert, and the number of rows of each expert, into rows. It knows
nothing of tokens, weights or routers.

Shape legend: R rows (token-expert pairs), E experts, D width, H hidden, G hidden of the first
matrix (2H for SwiGLU, whose gate comes first, else H).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from moesaic.config import Options

FFNKind = Literal["swiglu", "relu", "gelu", "relu2"]


class FFNOptions(Options):
    """One feed-forward network. ``relu2`` is the squared ReLU (Primer, arXiv 2109.08668)."""

    kind: FFNKind = "swiglu"
    hidden: int = Field(512, ge=1)
    bias: bool = False

    def parameters(self, width: int) -> int:
        """Trainable parameters of one such network."""
        matrices = 3 if self.kind == "swiglu" else 2
        inner = 2 * self.hidden if self.kind == "swiglu" else self.hidden
        return matrices * width * self.hidden + (inner + width if self.bias else 0)

    def multiply_adds(self, width: int) -> int:
        return (3 if self.kind == "swiglu" else 2) * width * self.hidden


class ExpertOptions(FFNOptions):
    """``count`` networks of one shape, and perhaps one more that every token passes through."""

    count: int = Field(8, ge=1)
    shared_hidden: int = Field(0, ge=0)
    shared_gate: bool = False

    @property
    def shared(self) -> FFNOptions | None:
        """The network that every token passes through, or None."""
        if not self.shared_hidden:
            return None
        return FFNOptions(kind=self.kind, hidden=self.shared_hidden, bias=self.bias)


def activate(z: Tensor, kind: FFNKind) -> Tensor:
    """The hidden activation [.., H] of the first matrix's output ``z`` [.., G]."""
    if kind == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "gelu":
        return F.gelu(z)
    hidden = F.relu(z)
    # Not square(): PyTorch's pow costs more than a product, forwards and backwards.
    return hidden if kind == "relu" else hidden * hidden


def activate_backward(grad: Tensor, z: Tensor, kind: FFNKind) -> Tensor:
    """The gradient at ``z`` [.., G] given the gradient at ``activate(z)`` [.., H], whose memory it
    may take."""
    if kind == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)], dim=-1)
    if kind == "gelu":
        d_gelu: Tensor = torch.ops.aten.gelu_backward(grad, z)
        return d_gelu
    if kind == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad)  # type: ignore[no-any-return]
    return F.relu(z).mul_(grad).mul_(2)


class FeedForward(nn.Module):
    """The dense network of a layer without experts, or the shared expert of one with."""

    def __init__(self, options: FFNOptions, width: int) -> None:
        super().__init__()
        self.kind = options.kind
        self.gate_proj = nn.Linear(width, options.hidden, options.bias) if self.kind == "swiglu" else None
        self.up_proj = nn.Linear(width, options.hidden, options.bias)
        self.down_proj = nn.Linear(options.hidden, width, options.bias)

    def forward(self, x: Tensor) -> Tensor:
        z = self.up_proj(x)
        if self.gate_proj is not None:
            hidden: Tensor = F.silu(self.gate_proj(x)) * z
        else:
            hidden = activate(z, self.kind)
        out: Tensor = self.down_proj(hidden)
        return out


class Experts(nn.Module):
    """A bank of experts held in memory as stacked matrices, as transformers 5 holds them."""

    def __init__(self, options: ExpertOptions, width: int) -> None:
        super().__init__()
        self.kind = options.kind
        e, h = options.count, options.hidden
        if self.kind == "swiglu":
            self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * h, width))
        else:
            self.up_proj = nn.Parameter(torch.empty(e, h, width))
        self.down_proj = nn.Parameter(torch.empty(e, width, h))
        inner = self.first_matrix.shape[1]
        self.up_bias = nn.Parameter(torch.empty(e, inner)) if options.bias else None
        self.down_bias = nn.Parameter(torch.empty(e, width)) if options.bias else None

    @property
    def first_matrix(self) -> nn.Parameter:
        """[E, G, D]: the gate and up matrices for SwiGLU, else the up matrix."""
        return self.gate_up_proj if self.kind == "swiglu" else self.up_proj

    def row_multiple(self, rows: int, device: torch.device) -> int:
        """To what multiple the caller should fill up each expert's rows.

        oneDNN compiles a bf16 product anew for every new shape: 3.5 ms each, against 0.4 ms to run
        it (500–1,500 rows, 192 × 384), and the number of rows differs at every step. Multiples of
        64 leave few shapes, which it remembers, at the price of 32 more rows per expert.
        """
        bf16 = self._compute_dtype(device.type) == torch.bfloat16
        return 64 if device.type == "cpu" and bf16 and rows >= 64 * len(self.down_proj) else 1

    def forward(self, rows_RD: Tensor, counts_E: list[int]) -> Tensor:
        """Run expert 0 on the first ``counts_E[0]`` rows, expert 1 on the next, and so on.

        Under autocast the work is done in its dtype; gradients reach parameters in their own.
        """
        first, down, up_bias, down_bias = self.first_matrix, self.down_proj, self.up_bias, self.down_bias
        device = rows_RD.device.type
        dtype = self._compute_dtype(device)
        with torch.autocast(device, enabled=False):
            out: Tensor = _ExpertFFN.apply(  # type: ignore[no-untyped-call]
                rows_RD.to(dtype),
                first.to(dtype),
                None if up_bias is None else up_bias.to(dtype),
                down.to(dtype),
                None if down_bias is None else down_bias.to(dtype),
                counts_E,
                self.kind,
            )
        return out

    def _compute_dtype(self, device: str) -> torch.dtype:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype


class _ExpertFFN(torch.autograd.Function):
    """All experts' FFNs as one autograd node.

    Indexing a stacked parameter, ``W[e]``, would allocate one full-size zero gradient per expert
    in backward. Here each expert's gradient is written into its slice, once. Only the input rows
    and the pre-activation are kept (what the ReLU left of it); the activation is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        first_EGD: Tensor,
        up_bias_EG: Tensor | None,
        down_EDH: Tensor,
        down_bias_ED: Tensor | None,
        counts_E: list[int],
        kind: FFNKind,
    ) -> Tensor:
        z_RG = x_RD.new_empty(len(x_RD), first_EGD.shape[1])
        y_RD = x_RD.new_empty(len(x_RD), down_EDH.shape[1])
        for e, rows in _slices(counts_E):
            _affine(x_RD[rows], first_EGD[e], None if up_bias_EG is None else up_bias_EG[e], z_RG[rows])
        if kind in ("relu", "relu2"):
            z_RG.relu_()  # all that forward and backward need of it, and no second buffer
        a_RH = z_RG if kind == "relu" else activate(z_RG, kind)
        for e, rows in _slices(counts_E):
            _affine(a_RH[rows], down_EDH[e], None if down_bias_ED is None else down_bias_ED[e], y_RD[rows])
        ctx.save_for_backward(x_RD, z_RG, first_EGD, down_EDH)
        ctx.counts_E, ctx.kind = counts_E, kind
        return y_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, z_RG, first_EGD, down_EDH = ctx.saved_tensors
        need_x, need_first, need_up_bias, need_down, need_down_bias = ctx.needs_input_grad[:5]
        dy_RD = dy_RD.contiguous()
        slices = _slices(ctx.counts_E)
        d_down = _like_stack(down_EDH, ctx.counts_E) if need_down else None
        d_first = _like_stack(first_EGD, ctx.counts_E) if need_first else None
        a_RH = z_RG if ctx.kind == "relu" else activate(z_RG, ctx.kind)
        da_RH = torch.empty_like(a_RH)
        for e, rows in slices:
            if d_down is not None:
                torch.mm(dy_RD[rows].t(), a_RH[rows], out=d_down[e])
            torch.mm(dy_RD[rows], down_EDH[e], out=da_RH[rows])
        dz_RG = activate_backward(da_RH, z_RG, ctx.kind)
        dx_RD = torch.empty_like(x_RD) if need_x else None
        for e, rows in slices:
            if d_first is not None:
                torch.mm(dz_RG[rows].t(), x_RD[rows], out=d_first[e])
            if dx_RD is not None:
                torch.mm(dz_RG[rows], first_EGD[e], out=dx_RD[rows])
        d_up_bias = _sum_rows(dz_RG, ctx.counts_E) if need_up_bias else None
        d_down_bias = _sum_rows(dy_RD, ctx.counts_E) if need_down_bias else None
        return dx_RD, d_first, d_up_bias, d_down, d_down_bias, None, None


def _slices(counts_E: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    found, start = [], 0
    for expert, count in enumerate(counts_E):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def _like_stack(stack: Tensor, counts_E: list[int]) -> Tensor:
    """Room for a stack's gradient; zero only where an expert had no row."""
    grad = torch.empty_like(stack)
    for expert, count in enumerate(counts_E):
        if not count:
            grad[expert].zero_()
    return grad


def _sum_rows(grad: Tensor, counts_E: list[int]) -> Tensor:
    sums = grad.new_zeros(len(counts_E), grad.shape[1])
    for expert, rows in _slices(counts_E):
        torch.sum(grad[rows], dim=0, out=sums[expert])
    return sums
