"""Slow, obvious oracles of the losses and of Muon's matrix step, written from the definitions alone.

Nothing here imports moesaic; loops run over tokens and experts, and everything stays in the
autograd graph (see reference.py, which holds the oracles of the model).

Shape legend: T tokens, E experts, K choices, D width, N rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Literal, NotRequired, TypedDict

import torch
from reference import exact
from torch import Tensor


class Layer(TypedDict):
    """What the loss oracles read of one layer. Without ``real`` every token is real."""

    probs: Tensor  # [T, E]
    logits: Tensor  # [T, E]
    choices: list[list[int]]  # per token, before capacity
    real: NotRequired[list[bool]]


def _real_tokens(layer: Layer) -> list[int]:
    real = layer.get("real")
    return [t for t in range(len(layer["choices"])) if real is None or real[t]]


def balance_loss(
    layers: Sequence[Layer], convention: Literal["olmoe", "olmo_core", "transformers"]
) -> Tensor:
    """olmoe, olmo_core: per layer, 1 when balanced. transformers: layers pooled, k when balanced."""
    experts = layers[0]["probs"].shape[1]
    if convention == "transformers":
        return experts * _load_times_probability(layers, per_choice=False)
    if convention not in ("olmoe", "olmo_core"):
        raise ValueError(f"no such convention: {convention!r}")
    losses = [experts * _load_times_probability([layer], per_choice=True) for layer in layers]
    return torch.stack(losses).mean()


def _load_times_probability(layers: Sequence[Layer], per_choice: bool) -> Tensor:
    """Sum over e of f_e * P_e over the real tokens of all ``layers`` together.

    f_e counts the choices of e, divided by the number of choices or else by the number of tokens
    (which is the sum over j of the share of tokens whose j-th choice is e). P_e is the mean of the
    probabilities after each token's are made to sum to 1, which changes sigmoid scores only.
    """
    total = torch.zeros((), dtype=exact(layers[0]["probs"]).dtype)
    everyone = [(layer, t) for layer in layers for t in _real_tokens(layer)]
    number_of_choices = sum(len(layer["choices"][t]) for layer, t in everyone)
    for e in range(layers[0]["probs"].shape[1]):
        count = sum(layer["choices"][t].count(e) for layer, t in everyone)
        f_e = count / (number_of_choices if per_choice else len(everyone))
        shares = [exact(layer["probs"][t, e]) / exact(layer["probs"][t]).sum() for layer, t in everyone]
        p_e = torch.stack(shares).mean()
        total = total + f_e * p_e
    return total


def z_loss(layers: Sequence[Layer], convention: Literal["olmoe", "olmo_core", "transformers"]) -> Tensor:
    """Mean squared logsumexp of the logits; olmoe divides by the (mean) choices per token as well."""
    if convention not in ("olmoe", "olmo_core", "transformers"):
        raise ValueError(f"no such convention: {convention!r}")
    losses: list[Tensor] = []
    for layer in layers:
        real = _real_tokens(layer)
        squares = [torch.logsumexp(exact(layer["logits"][t]), dim=0) ** 2 for t in real]
        mean_k = sum(len(layer["choices"][t]) for t in real) / len(real)
        losses.append(torch.stack(squares).mean() / (mean_k if convention == "olmoe" else 1.0))
    return torch.stack(losses).mean()


def entropy_bonus(layers: Sequence[Layer]) -> Tensor:
    """Minus the mean entropy (nats) of the real tokens' probabilities, normalised to sum to 1."""
    losses: list[Tensor] = []
    for layer in layers:
        entropies: list[Tensor] = []
        for t in _real_tokens(layer):
            p = exact(layer["probs"][t])
            p = p / p.sum()
            entropies.append(-torch.xlogy(p, p).sum())
        losses.append(-torch.stack(entropies).mean())
    return torch.stack(losses).mean()


def cross_entropy(
    hidden_ND: Tensor, w_VD: Tensor, b_V: Tensor | None, targets: Sequence[int]
) -> list[Tensor]:
    """Minus log softmax of each row's target (nats); 0 where the target is -100."""
    losses: list[Tensor] = []
    for n, target in enumerate(targets):
        if target == -100:
            losses.append(torch.zeros((), dtype=exact(hidden_ND).dtype))
            continue
        logits = [torch.dot(exact(hidden_ND[n]), exact(row)) for row in w_VD]
        if b_V is not None:
            logits = [logit + exact(b_V[v]) for v, logit in enumerate(logits)]
        largest = max(logit.item() for logit in logits)  # exp must not overflow
        total = torch.stack([torch.exp(logit - largest) for logit in logits]).sum()
        losses.append(torch.log(total) + largest - logits[target])
    return losses


def muon_orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrix: the singular vectors of ``g`` without its singular values."""
    u, _, vh = torch.linalg.svd(g.double(), full_matrices=False)
    return u @ vh
