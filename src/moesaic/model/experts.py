"""Feed-forward networks: one dense FFN, and a bank of experts behind one narrow contract.

A bank turns rows sorted by expert, and the number of rows of each expert, into rows. It knows
nothing of tokens, weights or routers.

Shape legend: R rows (token-expert pairs), E experts, D width, H hidden, G hidden of the first
matrix (2H for SwiGLU, whose gate comes first, else H), C rows of each expert where all have as many,
I and O what goes into and comes out of a product.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
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

    @model_validator(mode="after")
    def _gates_something(self) -> "ExpertOptions":
        if self.shared_gate and not self.shared_hidden:
            raise ValueError("shared_gate = true has no shared expert to gate; set shared_hidden too")
        return self

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

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        """How many rows the caller should lay out for each expert, ``counts_E`` of them real.

        Equal counts make the experts one batched product: its threads take whole experts each, and there
        is one call where there were E. oneDNN compiles a bf16 product anew for every new shape, 3.5 ms
        against 0.4 ms to run it (500–1,500 rows, 192 × 384): multiples of 64 leave it few shapes.
        """
        rows, most, experts = sum(counts_E), max(counts_E), len(counts_E)
        if device.type != "cpu" or not rows:
            return counts_E
        if experts * most <= 1.3 * rows and rows >= 32 * experts:
            bf16 = self._compute_dtype(device.type) == torch.bfloat16
            unit = 64 if bf16 and most > 64 else 4
            return [-(-most // unit) * unit] * experts
        if self._compute_dtype(device.type) == torch.bfloat16 and rows >= 64 * experts:
            return [-(-count // 64) * 64 for count in counts_E]
        return counts_E

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
        z_RG = _products(x_RD, first_EGD.mT, up_bias_EG, counts_E)
        if kind in ("relu", "relu2"):
            z_RG.relu_()  # all that forward and backward need of it, and no second buffer
        a_RH = z_RG if kind == "relu" else activate(z_RG, kind)
        y_RD = _products(a_RH, down_EDH.mT, down_bias_ED, counts_E)
        ctx.save_for_backward(x_RD, z_RG, first_EGD, down_EDH)
        ctx.counts_E, ctx.kind = counts_E, kind
        return y_RD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, z_RG, first_EGD, down_EDH = ctx.saved_tensors
        need_x, need_first, need_up_bias, need_down, need_down_bias = ctx.needs_input_grad[:5]
        counts_E, dy_RD = ctx.counts_E, dy_RD.contiguous()
        a_RH = z_RG if ctx.kind == "relu" else activate(z_RG, ctx.kind)
        d_down = _outer_products(dy_RD, a_RH, down_EDH, counts_E) if need_down else None
        dz_RG = activate_backward(_products(dy_RD, down_EDH, None, counts_E), z_RG, ctx.kind)
        d_first = _outer_products(dz_RG, x_RD, first_EGD, counts_E) if need_first else None
        dx_RD = _products(dz_RG, first_EGD, None, counts_E) if need_x else None
        d_up_bias = _sum_rows(dz_RG, counts_E) if need_up_bias else None
        d_down_bias = _sum_rows(dy_RD, counts_E) if need_down_bias else None
        return dx_RD, d_first, d_up_bias, d_down, d_down_bias, None, None


# Views are made by split and unbind, all in one call: an index costs 2 µs, and a step of makeMoE's model
# had 1,600 of them.


def _rows(x_R: Tensor, counts_E: list[int]) -> tuple[Tensor, ...]:
    """The rows of each expert that has any."""
    return x_R.split([count for count in counts_E if count]) if len(x_R) else ()


def _used(stack_E: Tensor, counts_E: list[int]) -> Sequence[Tensor]:
    """The slice of each expert that has any rows; the others are not touched."""
    return stack_E.unbind() if all(counts_E) else [stack_E[e] for e, count in enumerate(counts_E) if count]


def _slab(x_RI: Tensor, counts_E: list[int]) -> Tensor | None:
    """The rows as [E, C, I] where every expert has C of them, else None."""
    equal = len(x_RI) and min(counts_E) == max(counts_E)
    return x_RI.view(len(counts_E), -1, x_RI.shape[1]) if equal else None


def _products(x_RI: Tensor, stack_EIO: Tensor, bias_EO: Tensor | None, counts_E: list[int]) -> Tensor:
    """Each row times the matrix of its expert, plus that expert's bias; [R, O]."""
    y_RO = x_RI.new_empty(len(x_RI), stack_EIO.shape[2])
    x_ECI, y_ECO = _slab(x_RI, counts_E), _slab(y_RO, counts_E)
    if x_ECI is not None and bias_EO is None:
        torch.bmm(x_ECI, stack_EIO, out=y_ECO)
    elif x_ECI is not None and bias_EO is not None:
        torch.baddbmm(bias_EO[:, None], x_ECI, stack_EIO, out=y_ECO)
    elif bias_EO is None:
        for y, x, matrix in zip(
            _rows(y_RO, counts_E), _rows(x_RI, counts_E), _used(stack_EIO, counts_E), strict=True
        ):
            torch.mm(x, matrix, out=y)
    else:
        parts = (
            _rows(y_RO, counts_E),
            _rows(x_RI, counts_E),
            _used(stack_EIO, counts_E),
            _used(bias_EO, counts_E),
        )
        for y, x, matrix, bias in zip(*parts, strict=True):
            torch.addmm(bias, x, matrix, out=y)
    return y_RO


def _outer_products(dy_RO: Tensor, x_RI: Tensor, like_EOI: Tensor, counts_E: list[int]) -> Tensor:
    """The gradient of a stack: each expert's sum over its rows of dy ⊗ x; zero where it has none."""
    grad_EOI = torch.empty_like(like_EOI)
    dy_ECO, x_ECI = _slab(dy_RO, counts_E), _slab(x_RI, counts_E)
    if dy_ECO is not None and x_ECI is not None:
        return torch.bmm(dy_ECO.mT, x_ECI, out=grad_EOI)
    for expert, count in enumerate(counts_E):
        if not count:
            grad_EOI[expert].zero_()
    for grad, dy, x in zip(
        _used(grad_EOI, counts_E), _rows(dy_RO, counts_E), _rows(x_RI, counts_E), strict=True
    ):
        torch.mm(dy.t(), x, out=grad)
    return grad_EOI


def _sum_rows(grad_RO: Tensor, counts_E: list[int]) -> Tensor:
    grad_ECO = _slab(grad_RO, counts_E)
    if grad_ECO is not None:
        return grad_ECO.sum(1)
    sums_EO = grad_RO.new_zeros(len(counts_E), grad_RO.shape[1])
    for total, grad in zip(_used(sums_EO, counts_E), _rows(grad_RO, counts_E), strict=True):
        torch.sum(grad, dim=0, out=total)
    return sums_EO
