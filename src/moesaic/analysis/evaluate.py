"""Held-out loss by domain, and where each domain's tokens went.

Shape legend: B batch, T positions, L sparse layers, E experts, C domains.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.analysis.routing import counts_per_layer
from moesaic.data.store import Store
from moesaic.losses import IGNORE, token_losses
from moesaic.model.transformer import LanguageModel


@dataclass(frozen=True)
class DomainResult:
    """One domain's mean loss in nats per token, its bits per byte, tokens predicted, and choices of
    each expert in each sparse layer (int64 [L, E])."""

    domain: str
    loss: float
    bits_per_byte: float
    tokens: int
    counts_LE: Tensor


@dataclass(frozen=True)
class Evaluation:
    """The loss over all predicted tokens (nats per token), and the same by domain."""

    loss: float
    tokens: int
    domains: list[DomainResult]

    def counts_LE(self) -> Tensor:
        return torch.stack([d.counts_LE for d in self.domains]).sum(0)

    def counts_LCE(self) -> Tensor:
        """Choices per layer, domain and expert."""
        return torch.stack([d.counts_LE for d in self.domains], dim=1)


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    store: Store,
    batch_size: int,
    seq_len: int,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    most: int | None = None,
) -> Evaluation:
    """Loss on the validation part, every token predicted once, in windows of ``seq_len``; of each domain
    only the first ``most`` windows, or all.

    ``precision`` makes the context (autocast, say) to compute in.
    """
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    results = []
    for shard in store.shards:
        domain = shard.domain
        if shard.tokens - shard.train_tokens < 2:  # nothing there can be predicted
            continue
        total, tokens, left = 0.0, 0, most
        counts_LE = torch.zeros(len(model.config.moe_layers), model.config.experts.count, dtype=torch.int64)
        for windows in store.validation(batch_size, seq_len, domain):
            if left is not None:
                if left <= 0:
                    break
                windows = windows.first(left)
                left -= len(windows.ids_BT)
            ids_BT, target_BT, real_BT = windows.ids_BT, windows.target_BT, windows.real_BT
            target_N = target_BT.to(device).flatten()
            with precision():
                mask_BT = None if real_BT is None else real_BT.to(device)
                document = windows.document_BT
                document = None if document is None else document.to(device)
                output = model(ids_BT.to(device), mask_BT, document_BT=document, logits=False)
                losses_N = token_losses(output.hidden_BTD.flatten(0, 1), model.lm_head, target_N)
            total += losses_N.double().sum().item()
            tokens += int((target_BT != IGNORE).sum())
            if output.routings:
                counts_LE += counts_per_layer(output.routings).cpu()
        if tokens:
            nats_per_byte = total / tokens / store.bytes_per_token("val", domain)
            loss = total / tokens
            results.append(DomainResult(domain, loss, nats_per_byte / math.log(2), tokens, counts_LE))
    model.train(was_training)
    tokens = sum(r.tokens for r in results)
    return Evaluation(sum(r.loss * r.tokens for r in results) / max(1, tokens), tokens, results)
