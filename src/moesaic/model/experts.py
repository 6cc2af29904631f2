"""Feed-forward networks: one dense FFN, and a bank of experts behind one narrow contract.

A bank turns tokens, the weights of their choices and the choices sorted by expert into each token's weighted
sum. It knows nothing of routers; the products themselves are in grouped.py.

Shape legend: T tokens, K choices per token, R rows (token-expert pairs), E experts, D width, H hidden,
G hidden of the first matrix (2H for SwiGLU, whose gate comes first, else H).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moesaic.config import Options
from moesaic.model.dispatch import Dispatch
from moesaic.model.dropout import kept
from moesaic.model.grouped import fill, groups
from moesaic.model.low_rank import ExpertAdapter, low_rank
from moesaic.native.rows import Stack
from moesaic.native.rows import experts as few_experts

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
    """``count`` networks of one shape, and perhaps one more that every token passes through. ``names`` are
    for people: what each was before a merge."""

    count: int = Field(8, ge=1)
    shared_hidden: int = Field(0, ge=0)
    shared_gate: bool = False
    names: list[str] | None = None

    def name(self, expert: int) -> str:
        """What to call an expert."""
        return self.names[expert] if self.names else f"expert {expert}"

    @model_validator(mode="after")
    def _gates_something(self) -> "ExpertOptions":
        if self.names is not None and len(self.names) != self.count:
            raise ValueError(f"names: {len(self.names)} names for {self.count} experts")
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
        self.adapter: ExpertAdapter | None = None  # see lora.py

    @property
    def first_matrix(self) -> nn.Parameter:
        """[E, G, D]: the gate and up matrices for SwiGLU, else the up matrix."""
        return self.gate_up_proj if self.kind == "swiglu" else self.up_proj

    def fill(self, counts_E: list[int], device: torch.device) -> list[int]:
        """How many rows the caller should lay out for each expert, ``counts_E`` of them real."""
        if device.type != "cpu":
            return counts_E
        return fill(counts_E, self.down_proj[0].numel(), self._compute_dtype("cpu"))

    def forward(self, x_TD: Tensor, weight_TK: Tensor, dispatch: Dispatch, dropout: float = 0.0) -> Tensor:
        """y[t] = sum over k of weight[t, k] · E(x[t]), [T, D], E being the expert of choice (t, k).

        ``dropout`` acts on what experts return. Under autocast the work is done in its dtype; gradients
        reach parameters in their own.
        """
        first, down, up_bias, down_bias = self.first_matrix, self.down_proj, self.up_bias, self.down_bias
        device = x_TD.device.type
        dtype = self._compute_dtype(device)
        plain = not dropout and self.adapter is None
        if plain and not torch.is_grad_enabled() and dispatch.rows.few(first):
            stacks = Stack(first, up_bias), Stack(down, down_bias)
            rows = dispatch.rows
            return few_experts(x_TD, dispatch.order_R, weight_TK, *stacks, rows, self.kind).to(dtype)
        mask_RD = kept((len(dispatch.order_R), x_TD.shape[1]), dropout, device) if dropout else None
        with torch.autocast(device, enabled=False):
            out: Tensor = _ExpertFFN.apply(  # type: ignore[no-untyped-call]
                x_TD.to(dtype),
                weight_TK,
                first.to(dtype),
                None if up_bias is None else up_bias.to(dtype),
                down.to(dtype),
                None if down_bias is None else down_bias.to(dtype),
                dispatch,
                self.kind,
                None if mask_RD is None else mask_RD.to(dtype).mul_(1 / (1 - dropout)),
                *((None,) * 4 if self.adapter is None else self.adapter.matrices(dtype)),
            )
        return out

    def _compute_dtype(self, device: str) -> torch.dtype:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.down_proj.dtype


class _ExpertFFN(torch.autograd.Function):
    """All experts' FFNs as one autograd node, from tokens to tokens.

    Indexing a stacked parameter, ``W[e]``, would allocate one full-size zero gradient per expert
    in backward. Here each expert's gradient is written into its slice, once. Kept are the tokens and the
    pre-activation (what the ReLU left of it); rows are gathered and activated again, a group of experts at a
    time. With da = dy W before the weight w of a row is applied, the gradient of w is <da, a>, so what
    experts returned need not be kept either (SonicMoE, arXiv 2512.14080, section 3).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_TK: Tensor,
        first_EGD: Tensor,
        up_bias_EG: Tensor | None,
        down_EDH: Tensor,
        down_bias_ED: Tensor | None,
        dispatch: Dispatch,
        kind: FFNKind,
        mask_RD: Tensor | None,
        *factors: Tensor | None,
    ) -> Tensor:
        first_change, down_change = low_rank(*factors[:2]), low_rank(*factors[2:])
        R = len(dispatch.order_R)
        z_RG, y_RD = x_TD.new_empty(R, first_EGD.shape[1]), x_TD.new_empty(R, x_TD.shape[1])
        weight_R1 = dispatch.weight_R(weight_TK).to(x_TD.dtype)[:, None]
        for group in groups(dispatch.counts_E, dispatch.layer, x_TD.shape[1] + 2 * z_RG.shape[1], x_TD):
            rows = group.rows
            x = x_TD.index_select(0, dispatch.token_R[rows])
            z = group.products(x, first_EGD.mT, up_bias_EG, z_RG[rows])
            if first_change is not None:
                first_change.add(group, x, z)
            if kind in ("relu", "relu2"):
                z.relu_()  # all that forward and backward need of it, and no second buffer
            a = z if kind == "relu" else activate(z, kind)
            y = group.products(a, down_EDH.mT, down_bias_ED, y_RD[rows])
            if down_change is not None:
                down_change.add(group, a, y)
            y *= weight_R1[rows]
        if mask_RD is not None:
            y_RD *= mask_RD
        ctx.save_for_backward(x_TD, weight_TK, z_RG, first_EGD, down_EDH, down_bias_ED, mask_RD, *factors)
        ctx.dispatch, ctx.kind = dispatch, kind
        return dispatch.combine(y_RD)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_TK, z_RG, first_EGD, down_EDH, down_bias_ED, mask_RD, *factors = ctx.saved_tensors
        first_change, down_change = low_rank(*factors[:2]), low_rank(*factors[2:])
        d_first_change = None if first_change is None else first_change.empty_like()
        d_down_change = None if down_change is None else down_change.empty_like()
        need_x, need_weight, need_first, need_up_bias, need_down, need_down_bias = ctx.needs_input_grad[:6]
        dispatch, kind = ctx.dispatch, ctx.kind
        weight_R1 = dispatch.weight_R(weight_TK).to(x_TD.dtype)[:, None]
        exact = weight_TK.dtype  # float32, whatever the rows are
        d_weight_R = torch.empty(len(z_RG), dtype=exact, device=x_TD.device)
        dx_RD = (
            torch.empty(len(z_RG), x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device) if need_x else None
        )
        d_first = torch.empty_like(first_EGD) if need_first else None
        d_down = torch.empty_like(down_EDH) if need_down else None
        d_up_bias = first_EGD.new_zeros(first_EGD.shape[:2]) if need_up_bias else None
        d_down_bias = down_EDH.new_zeros(down_EDH.shape[:2]) if need_down_bias else None
        for group in groups(dispatch.counts_E, dispatch.layer, 3 * x_TD.shape[1] + 3 * z_RG.shape[1], x_TD):
            rows = group.rows
            z, weight_1 = z_RG[rows], weight_R1[rows]
            dy = dy_TD.index_select(0, dispatch.token_R[rows])
            if mask_RD is not None:
                dy *= mask_RD[rows]
            a = z if kind == "relu" else activate(z, kind)
            da = group.products(dy, down_EDH)
            if down_change is not None:
                down_change.add_back(group, dy, da)
            if need_weight:
                d_weight_R[rows] = (da * a).sum(-1, dtype=exact)
                if down_bias_ED is not None:
                    d_weight_R[rows] += (dy * group.spread(down_bias_ED)).sum(-1, dtype=exact)
            dy *= weight_1
            if d_down is not None:
                group.outer_products(dy, a, d_down)
            if down_change is not None and d_down_change is not None:
                down_change.write_gradients(group, dy, a, d_down_change)
            if d_down_bias is not None:
                group.sums(dy, d_down_bias)
            dz = activate_backward(da, z, kind)  # the weight still to come
            if d_up_bias is not None:
                group.outer_products(dz, weight_1, d_up_bias[..., None])
            if d_first is not None or first_change is not None:
                x = x_TD.index_select(0, dispatch.token_R[rows]).mul_(weight_1)
                if d_first is not None:
                    group.outer_products(dz, x, d_first)
                if first_change is not None and d_first_change is not None:
                    first_change.write_gradients(group, dz, x, d_first_change)
            if dx_RD is not None:
                dx = group.products(dz, first_EGD, None, dx_RD[rows])
                if first_change is not None:
                    first_change.add_back(group, dz, dx)
                dx *= weight_1
        dx_TD = None if dx_RD is None else dispatch.combine(dx_RD)
        d_weight_TK = dispatch.weight_gradient(d_weight_R) if need_weight else None
        of_factors = (*(d_first_change or (None, None)), *(d_down_change or (None, None)))
        return dx_TD, d_weight_TK, d_first, d_up_bias, d_down, d_down_bias, None, None, None, *of_factors
