"""Causal self-attention: multi-head or grouped-query, RoPE, QK-norm, and the key-value cache.

Shape legend: B batch, T positions of this call, S positions with the cache, D width,
N query heads, M key-value heads, H head size.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from moesaic.config import Options
from moesaic.model.dropout import dropout
from moesaic.model.norm import RMSNorm


class RopeScaling(Options):
    """Frequency scaling for longer contexts; ``llama3`` is the one of Llama 3.1 (its config.json)."""

    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(8.0, ge=1)
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: int = Field(8192, ge=1)

    @model_validator(mode="after")
    def _ramp_rises(self) -> "RopeScaling":
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor = {self.high_freq_factor} must be above "
                f"low_freq_factor = {self.low_freq_factor}"
            )
        return self


class AttentionOptions(Options):
    """Shape and variants of the attention of every layer.

    ``qk_norm``: ``head`` normalises each head's vector (Qwen3), ``full`` the whole projected
    vector before it is split into heads (OLMoE). ``scale``: scores are divided by the root of the
    ``head`` size (Vaswani et al. 2017), or of the ``width`` as makeMoE's published code does.
    """

    heads: int = Field(8, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    scale: Literal["head", "width"] = "head"
    rope_theta: float = Field(10_000.0, gt=1)
    rope_scaling: RopeScaling | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def head_size(self, width: int) -> int:
        return self.head_dim or width // self.heads

    def parameters(self, width: int) -> int:
        """Trainable parameters of one layer's attention, norms on queries and keys included."""
        size = self.head_size(width)
        q, kv = self.heads * size, self.num_kv_heads * size
        total = width * (q + 2 * kv) + q * width
        total += (q + 2 * kv if self.qkv_bias else 0) + (width if self.out_bias else 0)
        norm = {"none": 0, "head": 2 * size, "full": q + kv}[self.qk_norm]
        return total + norm


class KVCache:
    """Keys and values of the positions already seen, for every layer; filled in place.

    ``real_BS`` marks padding for batches of unequal prompts. ``length`` positions are filled; the
    model advances it once per call, after all layers have written theirs. ``before_LPBJD`` is what the
    short convolutions remember (conv.py): layer, place in the block, batch, the last positions, width.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        before_LPBJD: Tensor | None = None,
    ) -> None:
        shape = (layers, batch, kv_heads, capacity, head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.real_BS = torch.ones(batch, capacity, dtype=torch.bool, device=device)
        self.before_LPBJD = before_LPBJD
        self.padded = False
        self.length = 0
        self.capacity = capacity

    def of_rows(self, row_R: Tensor, capacity: int | None = None) -> "KVCache":
        """The same past for other rows: row r remembers what row ``row_R[r]`` of this one does. It has room
        for as many positions as this one, or for ``capacity``."""
        layers, _, kv_heads, _, head_dim = self.keys.shape
        before = None if self.before_LPBJD is None else self.before_LPBJD[:, :, row_R]
        other = KVCache(
            layers,
            len(row_R),
            capacity or self.capacity,
            kv_heads,
            head_dim,
            self.keys.device,
            self.keys.dtype,
            before,
        )
        other.keys[..., : self.length, :] = self.keys[:, row_R, :, : self.length]
        other.values[..., : self.length, :] = self.values[:, row_R, :, : self.length]
        other.real_BS[:, : self.length] = self.real_BS[row_R, : self.length]
        other.padded, other.length = self.padded, self.length
        return other

    def append(self, layer: int, k_BMTH: Tensor, v_BMTH: Tensor) -> tuple[Tensor, Tensor]:
        """Store this call's keys and values; returns all so far, [B, M, S, H] each."""
        end = self.length + k_BMTH.shape[2]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} are needed")
        self.keys[layer, :, :, self.length : end] = k_BMTH
        self.values[layer, :, :, self.length : end] = v_BMTH
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """One layer's attention. Parameters have Hugging Face names (``self_attn.q_proj`` …)."""

    def __init__(self, options: AttentionOptions, width: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.options = options
        self.head_dim = size = options.head_size(width)
        self.num_heads, self.num_kv_heads = options.heads, options.num_kv_heads
        self.scale = (width if options.scale == "width" else size) ** -0.5
        self.dropout = dropout
        self.q_proj = nn.Linear(width, self.num_heads * size, options.qkv_bias)
        self.k_proj = nn.Linear(width, self.num_kv_heads * size, options.qkv_bias)
        self.v_proj = nn.Linear(width, self.num_kv_heads * size, options.qkv_bias)
        self.o_proj = nn.Linear(self.num_heads * size, width, options.out_bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if options.qk_norm != "none":
            whole = options.qk_norm == "full"
            self.q_norm = RMSNorm(self.num_heads * size if whole else size, eps=eps)
            self.k_norm = RMSNorm(self.num_kv_heads * size if whole else size, eps=eps)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        allowed_BTS: Tensor | None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """``rope`` holds cosine and sine, [B or 1, T, H/2]; ``allowed_BTS`` is None for plain causal."""
        B, T, _ = x_BTD.shape
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        if self.q_norm is not None and self.k_norm is not None and self.options.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q_BTNH = q.view(B, T, self.num_heads, self.head_dim)
        k_BTMH = k.view(B, T, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None and self.options.qk_norm == "head":
            q_BTNH, k_BTMH = self.q_norm(q_BTNH), self.k_norm(k_BTMH)
        if rope is not None:
            q_BTNH, k_BTMH = rotate(q_BTNH, *rope), rotate(k_BTMH, *rope)
        q_BNTH, k_BMTH = q_BTNH.transpose(1, 2), k_BTMH.transpose(1, 2)
        v_BMTH = v.view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            k_BMTH, v_BMTH = cache.append(layer, k_BMTH, v_BMTH)
        p = self.dropout if self.training else 0.0
        y_BNTH = attend(q_BNTH, k_BMTH, v_BMTH, allowed_BTS, self.scale, p)
        y_BTD: Tensor = self.o_proj(y_BNTH.transpose(1, 2).reshape(B, T, -1))
        return dropout(y_BTD, self.dropout, self.training)


def attend(
    q_BNTH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, allowed_BTS: Tensor | None, scale: float, p: float
) -> Tensor:
    """Softmax attention, [B, N, T, H]; causal where ``allowed_BTS`` is None."""
    on_cpu, bf16 = q_BNTH.device.type == "cpu", q_BNTH.dtype == torch.bfloat16
    if on_cpu and (bf16 or p > 0) and torch.is_grad_enabled() and k_BMSH.shape[2] <= 512:
        return _plain_attention(q_BNTH, k_BMSH, v_BMSH, allowed_BTS, scale, p)
    return F.scaled_dot_product_attention(
        q_BNTH,
        k_BMSH,
        v_BMSH,
        attn_mask=None if allowed_BTS is None else allowed_BTS[:, None],
        dropout_p=p,
        is_causal=allowed_BTS is None and q_BNTH.shape[2] > 1,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BMSH.shape[1],
    )


def _plain_attention(
    q_BNTH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, allowed_BTS: Tensor | None, scale: float, p: float
) -> Tensor:
    """The same by plain products. PyTorch's CPU flash attention is slow backwards in bf16 (87 ms
    against 25 ms at B 64, N 4, T 128, H 64, two cores) and has no dropout. Past 512 keys the scores
    take too much room. Causal queries go 128 at a time, which leaves out keys that none of them may see."""
    N, T, M, S = q_BNTH.shape[1], q_BNTH.shape[2], k_BMSH.shape[1], k_BMSH.shape[2]
    if M != N:
        k_BMSH, v_BMSH = (x.repeat_interleave(N // M, dim=1) for x in (k_BMSH, v_BMSH))
    parts, seen = [], S - T
    with torch.autocast("cpu", enabled=False):  # it would carry the scores in float32
        for q in (q_BNTH * scale).split(128 if allowed_BTS is None else T, dim=2):
            seen += q.shape[2]
            score_BNTS = q @ k_BMSH[:, :, :seen].mT
            if allowed_BTS is None:
                barrier = score_BNTS.new_full(score_BNTS.shape[2:], -torch.inf)
                score_BNTS.add_(barrier.triu_(seen - q.shape[2] + 1))
            else:
                score_BNTS.masked_fill_(~allowed_BTS[:, None], -torch.inf)
            parts.append(dropout(score_BNTS.softmax(-1), p, True) @ v_BMSH[:, :, :seen])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def allowed_keys(
    T: int,
    cache: KVCache | None,
    real_BS: Tensor | None,
    device: torch.device,
    document_BT: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query may see, bool [B or 1, T, S]; None where plain causal attention will do.

    A padding query sees itself, so that its softmax is over something; nothing reads its output. With
    ``document_BT`` (and no cache) a query sees the keys of its own document.
    """
    start = 0 if cache is None else cache.length
    if real_BS is None and document_BT is None and (start == 0 or T == 1):
        return None
    query = torch.arange(start, start + T, device=device)[:, None]
    key = torch.arange(start + T, device=device)[None, :]
    allowed = (key <= query)[None]
    if document_BT is not None:
        allowed = allowed & (document_BT[:, :, None] == document_BT[:, None, :])
    if real_BS is None:
        return allowed
    return (allowed & real_BS[:, None, :]) | (key == query)[None]


def rope_frequencies(options: AttentionOptions, head_dim: int) -> Tensor:
    """Radians per position of each rotated pair, float32 [H/2] (RoFormer, arXiv 2104.09864, eq. 15).

    ``llama3`` scaling: wavelengths longer than original/low_freq_factor are stretched by
    ``factor``, those shorter than original/high_freq_factor are kept, and between is a ramp.
    """
    frequency = options.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    scaling = options.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = ramp.clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


class Rope:
    """Cosines and sines of positions. Not a module: its numbers follow from the options, so they
    belong to no checkpoint, and a model that is built without storage (on ``meta``) has them."""

    def __init__(self, options: AttentionOptions, head_dim: int) -> None:
        self.options, self.head_dim = options, head_dim

    def __call__(self, position_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, T, H/2] of int64 positions; angles are computed in float32."""
        frequency = rope_frequencies(self.options, self.head_dim).to(position_BT.device)
        angle_BTP = position_BT[..., None].float() * frequency
        return angle_BTP.cos(), angle_BTP.sin()


def rotate(x_BTNH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """Rotate the pairs (i, i + H/2) of [B, T, N, H], Hugging Face's convention for Llama."""
    if not torch.is_grad_enabled():
        return _rotated(x_BTNH, cos_BTP, sin_BTP)
    y_BTNH: Tensor = _Rotate.apply(x_BTNH, cos_BTP, sin_BTP)  # type: ignore[no-untyped-call]
    return y_BTNH


class _Rotate(torch.autograd.Function):
    """Its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x_BTNH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTP, sin_BTP)
        return _rotated(x_BTNH, cos_BTP, sin_BTP)

    @staticmethod
    def backward(ctx: Any, dy_BTNH: Tensor) -> tuple[Tensor, None, None]:
        cos_BTP, sin_BTP = ctx.saved_tensors
        return _rotated(dy_BTNH, cos_BTP, -sin_BTP), None, None


def _rotated(x_BTNH: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    cos, sin = (t[:, :, None].to(x_BTNH.dtype) for t in (cos_BTP, sin_BTP))
    y_BTNH = torch.empty_like(x_BTNH)
    (x1, x2), (y1, y2) = x_BTNH.chunk(2, dim=-1), y_BTNH.chunk(2, dim=-1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    return y_BTNH
