"""What routings say: load, dead experts, specialisation, and who took which token.

Everything here reads ``Routing`` values or counts made from them.

Shape legend: L sparse layers, E experts, T tokens, K choices, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.routing import Routing


@dataclass(frozen=True)
class LoadSummary:
    """How evenly the experts of each layer are used.

    Attributes:
        balance_L: busiest expert's load over the mean load; 1 is even, E is one expert for all.
        dead_share: share of all experts, over all layers, that got no token.
        entropy: entropy of the load over its maximum log E, mean over layers; 1 is even.
    """

    balance_L: list[float]
    dead_share: float
    entropy: float

    @property
    def balance(self) -> float:
        return sum(self.balance_L) / len(self.balance_L)


def counts_per_layer(routings: Sequence[Routing], *, wanted: bool = False) -> Tensor:
    """Choices per layer and expert, int64 [L, E]."""
    return torch.stack([r.counts_E(wanted=wanted) for r in routings])


def summarise_load(counts_LE: Tensor) -> LoadSummary:
    """Balance, dead experts and entropy of counts [L, E] (any number type)."""
    counts_LE = counts_LE.double()
    mean_L = counts_LE.mean(1).clamp(min=1e-12)
    share_LE = counts_LE / counts_LE.sum(1, keepdim=True).clamp(min=1e-12)
    experts = counts_LE.shape[1]
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(1)
    most = torch.log(torch.tensor(float(experts))).item() if experts > 1 else 1.0
    return LoadSummary(
        balance_L=(counts_LE.max(1).values / mean_L).tolist(),
        dead_share=(counts_LE == 0).double().mean().item(),
        entropy=(entropy_L.mean() / most).item() if experts > 1 else 1.0,
    )


def neighbours_summed(counts_LE: Tensor, most: int = 256) -> tuple[Tensor, int]:
    """Counts of at most ``most`` groups of experts that stand beside each other, and how many experts are in
    one (the last may have fewer): what is written of thousands does not grow with them."""
    size = -(-counts_LE.shape[1] // most)
    padded_LE = torch.nn.functional.pad(counts_LE, (0, -counts_LE.shape[1] % size))
    return padded_LE.unflatten(1, (-1, size)).sum(2), size


def dropped_share(routings: Sequence[Routing]) -> float:
    """Share of the wanted choices that capacity dropped, over all layers."""
    wanted = sum(int(r.wanted_TK.sum()) for r in routings)
    kept = sum(int(r.keep_TK.sum()) for r in routings)
    return 1.0 - kept / wanted if wanted else 0.0


def specialisation(counts_CE: Tensor) -> Tensor:
    """Share of each domain's choices that went to each expert, float64 [C, E].

    OLMoE's domain specialisation (arXiv 2409.02060, section 5.3): without any specialisation every
    row equals the load of the experts over all domains.
    """
    counts_CE = counts_CE.double()
    return counts_CE / counts_CE.sum(1, keepdim=True).clamp(min=1)


def mutual_information(counts_CE: Tensor) -> float:
    """Bits that an expert's name tells about the domain, domains weighted equally; 0 is nothing,
    log2 of the number of domains is everything."""
    joint_CE = specialisation(counts_CE) / max(1, len(counts_CE))
    domain_C1 = joint_CE.sum(1, keepdim=True)
    expert_1E = joint_CE.sum(0, keepdim=True)
    ratio = joint_CE / (domain_C1 * expert_1E).clamp(min=1e-300)
    return float(torch.special.xlogy(joint_CE, ratio).sum() / torch.log(torch.tensor(2.0)))


@dataclass(frozen=True)
class ExpertShare:
    """One expert's part in a text: its share of the gate weight, and of the tokens it was top for."""

    expert: int
    confidence: float
    top_share: float


def dominant_experts(routing: Routing, most: int = 3) -> list[ExpertShare]:
    """The experts with the largest share of the (normalised) gate weight, best first.

    Each token's kept weights are scaled to sum to 1, so that the confidences of all experts of a
    layer sum to 1 whatever the router's convention.
    """
    weight_TE = token_weights(routing)
    confidence_E = weight_TE.sum(0) / weight_TE.sum().clamp(min=1e-12)
    top_E = torch.bincount(weight_TE.argmax(1), minlength=routing.num_experts) / max(1, len(weight_TE))
    order = confidence_E.argsort(descending=True)[:most].tolist()
    return [ExpertShare(e, confidence_E[e].item(), top_E[e].item()) for e in order if confidence_E[e] > 0]


def token_weights(routing: Routing) -> Tensor:
    """Each token's gate weight per expert, scaled to sum to 1 over what was kept; float32 [T, E]."""
    weight_TK = routing.weight_TK.float() * routing.keep_TK
    weight_TE = torch.zeros_like(routing.probs_TE).scatter_add_(1, routing.expert_TK, weight_TK)
    return weight_TE / weight_TE.sum(1, keepdim=True).clamp(min=1e-12)
