"""Slow, obvious oracles of what mixes positions: attention, one query, head and key at a time, and the
short convolution, one position, tap and feature at a time.

Nothing here imports moesaic (see reference.py, which holds the oracles of the rest of the model).

Shape legend: T tokens, D width.
"""

import math
from typing import Literal

import torch
from reference import affine, exact
from torch import Tensor


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * exact(weight)


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary embedding, rotate-half convention: i turns with i + half, by position * theta^(-2i/size)."""
    half = len(x) // 2
    out: list[Tensor] = [x.new_zeros(())] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return torch.stack(out)


def short_conv(x_TD: Tensor, weight_KD: Tensor) -> Tensor:
    """Each feature plus the weighted features of this position and the K - 1 before it."""
    rows = []
    for t in range(len(x_TD)):
        features = []
        for d in range(x_TD.shape[1]):
            total = x_TD[t, d]
            for i in range(len(weight_KD)):
                if t - i >= 0:
                    total = total + weight_KD[i, d] * x_TD[t - i, d]
            features.append(total)
        rows.append(torch.stack(features))
    return torch.stack(rows)


def attention(
    x_TD: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    qkv_bias: tuple[Tensor, Tensor, Tensor] | None = None,
    qk_norm: Literal["head", "full"] | None = None,
    q_norm_w: Tensor | None = None,
    k_norm_w: Tensor | None = None,
    eps: float = 1e-5,
    rope_theta: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of one sequence that starts at position 0; ``scale`` None is head_dim**-0.5.

    wq is [heads*head_dim, D], wk and wv are [kv_heads*head_dim, D], wo is [D, heads*head_dim].
    """
    bq, bk, bv = qkv_bias if qkv_bias is not None else (None, None, None)
    scale = head_dim**-0.5 if scale is None else scale

    def heads_of(projected: Tensor, number: int, norm_w: Tensor | None) -> list[list[Tensor]]:
        """Per position, per head: the vector that q and k meet with."""
        result: list[list[Tensor]] = []
        for t in range(len(projected)):
            row = projected[t]
            if qk_norm == "full":
                assert norm_w is not None
                row = _rms_norm(row, norm_w, eps)
            split = [row[h * head_dim : (h + 1) * head_dim] for h in range(number)]
            if qk_norm == "head":
                assert norm_w is not None
                split = [_rms_norm(v, norm_w, eps) for v in split]
            if rope_theta is not None:
                split = [rotate(v, t, rope_theta) for v in split]
            result.append(split)
        return result

    q = heads_of(affine(x_TD, wq, bq), heads, q_norm_w)
    k = heads_of(affine(x_TD, wk, bk), kv_heads, k_norm_w)
    v_TF = affine(x_TD, wv, bv)
    rows: list[Tensor] = []
    for t in range(len(x_TD)):
        outputs: list[Tensor] = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = torch.stack([torch.dot(q[t][h], k[s][group]) * scale for s in range(t + 1)])
            share = torch.softmax(scores, dim=0)
            values = [v_TF[s, group * head_dim : (group + 1) * head_dim] for s in range(t + 1)]
            outputs.append(torch.stack([share[s] * values[s] for s in range(t + 1)]).sum(dim=0))
        rows.append(exact(wo) @ torch.cat(outputs))
    return torch.stack(rows)
