"""Every scalar that is optimised, as a pure function. Routing losses read ``Routing`` values only.

Shape legend: N tokens, D width, V vocabulary, T tokens of one routing, E experts, K choices.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moesaic.routing import Routing

IGNORE = -100
BalanceConvention = Literal["olmoe", "olmo_core", "transformers"]
ZConvention = Literal["olmoe", "plain"]
PreferenceLoss = Literal["dpo", "dpo_norm", "ipo", "kto"]
AVERAGED: tuple[PreferenceLoss, ...] = ("dpo_norm", "ipo")  # compare answers by nats per token


def token_losses(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], target_N: Tensor, *, max_logits: int = 2**24
) -> Tensor:
    """Cross-entropy of each token in nats, float32 [N]; 0 where the target is ``IGNORE``.

    The logits are made ``max_logits`` numbers at a time (2**24 are 64 MB in float32) and again in
    backward, so a vocabulary of 100,000 never stands in memory for all tokens at once. Where all
    of them fit, they are made once.
    """
    N = len(hidden_ND)
    vocabulary = head(hidden_ND[:1]).shape[-1] if N else 1
    rows = max(1, max_logits // vocabulary)
    if rows >= N:
        return _token_losses(hidden_ND, head, target_N)
    parts = [
        checkpoint(_token_losses, hidden_ND[i : i + rows], head, target_N[i : i + rows], use_reentrant=False)
        for i in range(0, N, rows)
    ]
    return torch.cat(parts)


def _token_losses(hidden_ND: Tensor, head: Callable[[Tensor], Tensor], target_N: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_ND).float(), target_N, ignore_index=IGNORE, reduction="none")


def cross_entropy(
    hidden_ND: Tensor, head: Callable[[Tensor], Tensor], target_N: Tensor, *, max_logits: int = 2**24
) -> Tensor:
    """Mean cross-entropy in nats over the tokens whose target is not ``IGNORE``; float32 scalar."""
    losses_N = token_losses(hidden_ND, head, target_N, max_logits=max_logits)
    return losses_N.sum() / (target_N != IGNORE).sum().clamp(min=1)


def preference_losses(
    kind: PreferenceLoss, chosen_P: Tensor, rejected_P: Tensor, beta: float, smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair, float32 [P] (``kto``: of each answer, [2 P]).

    ``chosen_P`` and ``rejected_P`` are log-ratios: what the model gives an answer less what the reference
    does, in nats, or nats per token for ``AVERAGED`` kinds. ``dpo``: −log σ(β Δ), Δ their difference, of
    which ``smoothing`` is the share of labels taken to be wrong (arXiv 2305.18290, eq. 7; 2310.12036 for
    ``ipo``: (Δ − 1/2β)²). ``dpo_norm`` is ``dpo`` per token (Tülu 3, 2411.15124). ``kto``: each answer
    against the mean of the other kind in the batch, which stands for the divergence (2402.01306, eq. 8, for
    data that comes in pairs)."""
    difference_P = chosen_P - rejected_P
    if kind in ("dpo", "dpo_norm"):
        right, wrong = F.logsigmoid(beta * difference_P), F.logsigmoid(-beta * difference_P)
        return -(1 - smoothing) * right - smoothing * wrong
    if kind == "ipo":
        return (difference_P - 1 / (2 * beta)).square()
    chosen_kl, rejected_kl = (x.detach().mean().clamp(min=0) for x in (chosen_P, rejected_P))
    return torch.cat(
        [
            1 - torch.sigmoid(beta * (chosen_P - rejected_kl)),
            1 - torch.sigmoid(beta * (chosen_kl - rejected_P)),
        ]
    )


def balance_loss(routings: Sequence[Routing], convention: BalanceConvention = "olmoe") -> Tensor:
    """Load-balancing loss; float32 scalar. Its gradient reaches the router through the probabilities.

    ``olmoe`` and ``olmo_core``: per layer E · Σ_e f_e · P_e, with f the share of the wanted choices
    and P the mean probability, over real tokens; then the mean over layers. 1 is balanced, for any
    k; E (or E/k) is collapsed (Switch, arXiv 2101.03961, eq. 4; OLMoE, arXiv 2409.02060, eq. 3).
    ``transformers``: f is a share of tokens, so that k is balanced, and all layers are pooled
    before the product, which hides layers that have collapsed onto different experts. It is here
    to reproduce others' numbers.
    """
    if not routings:
        raise ValueError("a balance loss needs the routing of at least one sparse layer")
    if convention == "transformers":
        shares = [_load_and_probability(r) for r in routings]
        tokens = torch.stack([n for _, _, n in shares])
        load_E = torch.stack([load for load, _, _ in shares]).sum(0) / tokens.sum()
        probability_E = torch.stack([p * n for _, p, n in shares]).sum(0) / tokens.sum()
        return (load_E * probability_E).sum() * routings[0].num_experts
    per_layer = []
    for routing in routings:
        load_E, probability_E, _ = _load_and_probability(routing)
        share_E = load_E / load_E.sum().clamp(min=1)
        per_layer.append((share_E * probability_E).sum() * routing.num_experts)
    return torch.stack(per_layer).mean()


def z_loss(routings: Sequence[Routing], convention: ZConvention = "olmoe") -> Tensor:
    """Mean squared log-partition of the router logits (ST-MoE, arXiv 2202.08906, eq. 5).

    ``plain`` divides by the number of real tokens, as the paper and OLMo-core do; ``olmoe`` also by
    the (mean) number of choices per token, as OLMoE's training code did, so that its weight 0.001
    at top-8 is 0.000125 of the plain one. Mean over layers; float32 scalar.
    """
    if not routings:
        raise ValueError("a z-loss needs the routing of at least one sparse layer")
    per_layer = []
    for routing in routings:
        square_T = routing.logits_TE.logsumexp(-1).square()
        wanted = routing.wanted_TK.sum().clamp(min=1)
        total = square_T.sum() if routing.real_T is None else (square_T * routing.real_T).sum()
        per_layer.append(total / (wanted if convention == "olmoe" else _real_tokens(routing)))
    return torch.stack(per_layer).mean()


def entropy_bonus(routings: Sequence[Routing]) -> Tensor:
    """Minus the mean entropy in nats of each token's routing distribution; float32 scalar.

    Added with a positive weight, it keeps a router from becoming certain too early. Mean over real
    tokens, then over layers.
    """
    if not routings:
        raise ValueError("an entropy bonus needs the routing of at least one sparse layer")
    per_layer = []
    for routing in routings:
        entropy_T: Tensor = _Entropy.apply(routing.distribution_TE)  # type: ignore[no-untyped-call]
        total = entropy_T.sum() if routing.real_T is None else (entropy_T * routing.real_T).sum()
        per_layer.append(-total / _real_tokens(routing))
    return torch.stack(per_layer).mean()


def convert_balance_weight(
    weight: float, source: BalanceConvention, target: BalanceConvention, top_k: int
) -> float:
    """The coefficient under ``target`` that punishes a balanced router as ``weight`` under ``source``.

    Exact for one layer; for several, ``transformers`` pools them, which no coefficient can undo.
    """
    scale = {"olmoe": 1, "olmo_core": 1, "transformers": top_k}
    return weight * scale[source] / scale[target]


def convert_z_weight(weight: float, source: ZConvention, target: ZConvention, top_k: int) -> float:
    """The coefficient under ``target`` equal to ``weight`` under ``source``; exact."""
    scale = {"olmoe": 1 / top_k, "plain": 1.0}
    return weight * scale[source] / scale[target]


def _load_and_probability(routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
    """Wanted choices per expert [E], mean probability [E], number of real tokens []; float32."""
    p_TE = routing.distribution_TE
    tokens = _real_tokens(routing)
    total_E = p_TE.sum(0) if routing.real_T is None else (p_TE * routing.real_T[:, None]).sum(0)
    return routing.counts_E(wanted=True).float(), total_E / tokens, tokens


class _Entropy(torch.autograd.Function):
    """Of each row, in nats, as one autograd node: six passes over rows of thousands of experts, where its
    operations by themselves make eleven."""

    @staticmethod
    def forward(ctx: Any, p_TE: Tensor) -> Tensor:
        # A probability that underflows to 0 must not make the gradient NaN (0 / 0 in xlogy's).
        log_TE = p_TE.clamp(min=torch.finfo(p_TE.dtype).tiny).log_()
        ctx.save_for_backward(log_TE)
        entropy_T: Tensor = -(p_TE * log_TE).sum(-1)
        return entropy_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_T: Tensor) -> Tensor:
        (log_TE,) = ctx.saved_tensors
        d_TE: Tensor = (log_TE + 1).mul_(-d_T[:, None])
        return d_TE


def _real_tokens(routing: Routing) -> Tensor:
    if routing.real_T is None:
        return torch.tensor(float(len(routing.logits_TE)), device=routing.logits_TE.device)
    return routing.real_T.sum().clamp(min=1).float()
