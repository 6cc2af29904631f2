"""Slow, obvious oracles: what the fast code must compute, written from the definitions alone.

Nothing here imports moesaic. Loops run over tokens, choices and experts; everything stays in the
autograd graph, so that tests compare gradients as well as values. Arithmetic is float32, or float64
where the inputs are float64.

The oracle of attention is in reference_attention.py, those of the losses and of Muon in
reference_losses.py.

Shape legend: B sequences, T tokens, E experts, K choices, D width, H hidden, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = list[dict[int, Tensor]]  # per token: expert -> gate weight (0-dim)


class Routed(TypedDict):
    """What a router oracle returns. ``list(weights[t])`` is token t's experts, best first
    (in ascending order of expert where experts choose)."""

    weights: Weights
    logits: Tensor  # [T, E]
    probs: Tensor  # [T, E]


def exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def affine(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    y = exact(x) @ exact(w).T
    return y if b is None else y + exact(b)


def _best_first(scores: Tensor) -> list[int]:
    """Indices by descending score; equal scores keep their order."""
    values = scores.tolist()
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


# ---- routers ----------------------------------------------------------------------------------


def top_k(
    x_TD: Tensor,
    w_ED: Tensor,
    b_E: Tensor | None,
    k: int,
    score: Literal["softmax", "sigmoid"] = "softmax",
    softmax_after: bool = False,
    renormalize: bool = False,
    selection_bias_E: Tensor | None = None,
) -> Routed:
    """The k experts of largest score; ``selection_bias_E`` moves the choice, never the weight."""
    if score not in ("softmax", "sigmoid") or (softmax_after and score != "softmax"):
        raise ValueError(f"no such router: score={score!r}, softmax_after={softmax_after}")
    logits = affine(x_TD, w_ED, b_E)
    probs = torch.softmax(logits, dim=1) if score == "softmax" else torch.sigmoid(logits)
    weights: Weights = []
    for t in range(len(logits)):
        ranked_by = probs[t] if selection_bias_E is None else probs[t] + selection_bias_E
        chosen = _best_first(ranked_by)[:k]
        if softmax_after:
            total = sum(torch.exp(logits[t, e] - logits[t].max()) for e in chosen)
            gates = {e: torch.exp(logits[t, e] - logits[t].max()) / total for e in chosen}
        elif renormalize:
            total = sum(probs[t, e] for e in chosen)
            gates = {e: probs[t, e] / total for e in chosen}
        else:
            gates = {e: probs[t, e] for e in chosen}
        weights.append(gates)
    return Routed(weights=weights, logits=logits, probs=probs)


def loss_free_update(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next selection bias: up for an expert below the mean load, down for one above it."""
    counts = counts_E.to(bias_E.dtype)
    return bias_E + rate * torch.sign(counts.mean() - counts)


def noisy_top_k(
    x_TD: Tensor,
    w_ED: Tensor,
    b_E: Tensor | None,
    w_noise_ED: Tensor,
    b_noise_E: Tensor | None,
    noise_TE: Tensor | None,
    k: int,
) -> Routed:
    """Top k of logits plus learned noise (None: evaluation). The logits returned are the clean ones."""
    logits = affine(x_TD, w_ED, b_E)
    noisy = logits
    if noise_TE is not None:
        noisy = logits + noise_TE * F.softplus(affine(x_TD, w_noise_ED, b_noise_E))
    weights: Weights = []
    for t in range(len(logits)):
        chosen = _best_first(noisy[t])[:k]
        gates = torch.softmax(torch.stack([noisy[t, e] for e in chosen]), dim=0)
        weights.append({e: gates[j] for j, e in enumerate(chosen)})
    return Routed(weights=weights, logits=logits, probs=torch.softmax(noisy, dim=1))


def expert_choice(x_TD: Tensor, w_ED: Tensor, b_E: Tensor | None, k: int) -> Routed:
    """Every expert takes the max(1, T*k // E) tokens that want it most."""
    logits = affine(x_TD, w_ED, b_E)
    probs = torch.softmax(logits, dim=1)
    tokens, experts = logits.shape
    capacity = max(1, tokens * k // experts)
    weights: Weights = [{} for _ in range(tokens)]
    for e in range(experts):
        for t in _best_first(probs[:, e])[:capacity]:
            weights[t][e] = probs[t, e]
    return Routed(weights=weights, logits=logits, probs=probs)


def smart(
    x_TD: Tensor,
    w_ED: Tensor,
    b_E: Tensor | None,
    log_temperature: Tensor,
    jitter_TD: Tensor | None,
    min_k: int,
    max_k: int,
    mass: float,
) -> Routed:
    """As many experts as it takes to reach ``mass`` probability. Logits are the tempered ones."""
    x = exact(x_TD) if jitter_TD is None else exact(x_TD) * jitter_TD
    logits = affine(x, w_ED, b_E) / torch.exp(log_temperature)
    probs = torch.softmax(logits, dim=1)
    weights: Weights = []
    for t in range(len(logits)):
        chosen: list[int] = []
        before = 0.0
        for e in _best_first(probs[t])[:max_k]:
            if len(chosen) >= min_k and before >= mass:
                break
            chosen.append(e)
            before += probs[t, e].item()
        total = sum(probs[t, e] for e in chosen)
        weights.append({e: probs[t, e] / total for e in chosen})
    return Routed(weights=weights, logits=logits, probs=probs)


def capacity_drop(choices: Sequence[Sequence[int]], experts: int, capacity: int) -> list[list[bool]]:
    """Whether each choice is kept: an expert takes its first ``capacity`` choices in order of arrival."""
    taken = [0] * experts
    kept: list[list[bool]] = []
    for of_token in choices:
        row: list[bool] = []
        for e in of_token:
            row.append(taken[e] < capacity)
            taken[e] += 1
        kept.append(row)
    return kept


# ---- experts ----------------------------------------------------------------------------------


def expert_ffn(
    x_D: Tensor,
    kind: Literal["swiglu", "relu", "gelu", "relu2"],
    gate: Tensor | None = None,
    up: Tensor | None = None,
    down: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """One expert on one token. gate and up are [H, D], down is [D, H]; only swiglu has a gate."""
    assert up is not None
    assert down is not None
    x = exact(x_D)
    raised = exact(up) @ x
    if up_bias is not None:
        raised = raised + exact(up_bias)
    if kind == "swiglu":
        assert gate is not None
        gated = exact(gate) @ x
        if gate_bias is not None:
            gated = gated + exact(gate_bias)
        hidden = gated * torch.sigmoid(gated) * raised
    elif kind == "relu":
        hidden = torch.relu(raised)
    elif kind == "gelu":
        hidden = raised * 0.5 * (1 + torch.erf(raised / math.sqrt(2)))
    elif kind == "relu2":
        hidden = torch.relu(raised) ** 2
    else:
        raise ValueError(f"no such expert: {kind!r}")
    y = exact(down) @ hidden
    return y if down_bias is None else y + exact(down_bias)


def moe(x_TD: Tensor, weights: Weights, experts: Sequence[Mapping[str, Any]]) -> Tensor:
    """y_t = sum over token t's experts of weight * expert(x_t); ``experts[e]`` are keywords of expert_ffn."""
    rows: list[Tensor] = []
    for t, gates in enumerate(weights):
        y = torch.zeros_like(exact(x_TD[t]))
        for e, weight in gates.items():
            y = y + weight * expert_ffn(x_TD[t], **experts[e])
        rows.append(y)
    return torch.stack(rows)


# ---- a whole model ----------------------------------------------------------------------------


class _Head(nn.Module):
    """One attention head with its own three projections."""

    causal: Tensor

    def __init__(self, width: int, size: int, window: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.query = nn.Linear(width, size, bias=False)
        self.key = nn.Linear(width, size, bias=False)
        self.value = nn.Linear(width, size, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self.register_buffer("causal", torch.ones(window, window, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(1, 2) * self.scale
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        mixed: Tensor = self.dropout(torch.softmax(scores, dim=-1)) @ self.value(x)
        return mixed


class _Attention(nn.Module):
    """Heads one after the other, joined and projected."""

    def __init__(self, width: int, heads: int, window: int, dropout: float, scale: float) -> None:
        super().__init__()
        size = width // heads
        self.heads = nn.ModuleList(_Head(width, size, window, dropout, scale) for _ in range(heads))
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([head(x) for head in self.heads], dim=-1)
        out: Tensor = self.dropout(self.output(joined))
        return out


class _SparseMoE(nn.Module):
    """Noisy top-k router, then a loop over experts that masks, runs, weighs and adds in place."""

    def __init__(self, width: int, experts: int, top_k: int, dropout: float) -> None:
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(width, experts)
        self.noise = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
            )
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        best, chosen = logits.topk(self.top_k, dim=-1)
        gates = torch.softmax(torch.full_like(logits, float("-inf")).scatter(-1, chosen, best), dim=-1)
        flat, flat_gates, flat_chosen = x.flatten(0, 1), gates.flatten(0, 1), chosen.flatten(0, 1)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            mask = (flat_chosen == e).any(dim=-1)
            if mask.any():
                out[mask] += flat_gates[mask, e].unsqueeze(1) * expert(flat[mask])
        return out.view_as(x)


class _Block(nn.Module):
    def __init__(self, width: int, attention: _Attention, sparse_moe: _SparseMoE) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = attention
        self.norm_moe = nn.LayerNorm(width)
        self.moe = sparse_moe

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        out: Tensor = x + self.moe(self.norm_moe(x))
        return out


class PlainMakeMoE(nn.Module):
    """A makeMoE-style character model, one module per attention head and per expert.

    Router noise and dropout act in training mode only. ``scale`` says whose size the attention
    scores are divided by the square root of: the width's or the head's.
    """

    def __init__(
        self,
        vocab: int,
        width: int = 128,
        layers: int = 8,
        heads: int = 8,
        experts: int = 8,
        top_k: int = 2,
        window: int = 32,
        dropout: float = 0.1,
        scale: Literal["width", "head"] = "width",
    ) -> None:
        super().__init__()
        self.window = window
        factor = (width if scale == "width" else width // heads) ** -0.5
        self.tokens = nn.Embedding(vocab, width)
        self.positions = nn.Embedding(window, width)
        self.blocks = nn.Sequential(
            *(
                _Block(
                    width,
                    _Attention(width, heads, window, dropout, factor),
                    _SparseMoE(width, experts, top_k, dropout),
                )
                for _ in range(layers)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, T] with T <= window to logits [B, T, V]."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    @torch.no_grad()
    def generate(self, ids: Tensor, n: int, greedy: bool = False) -> Tensor:
        """ids [B, T] and n new tokens behind them; the whole window is computed anew for each one.

        Runs in the mode the model is in: call ``eval()`` first for generation without noise.
        """
        for _ in range(n):
            last = self(ids[:, -self.window :])[:, -1]
            if greedy:
                following = last.argmax(dim=-1, keepdim=True)
            else:
                following = torch.multinomial(torch.softmax(last, dim=-1), 1)
            ids = torch.cat([ids, following], dim=1)
        return ids


def plain_optimizer(model: nn.Module, learning_rate: float = 1e-3) -> torch.optim.AdamW:
    """AdamW that updates one tensor after the other."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, foreach=False, fused=False)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor) -> Tensor:
    """One training step on ids and targets [B, T]; returns the loss before the step."""
    loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return loss.detach()
