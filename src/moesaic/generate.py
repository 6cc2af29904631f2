"""Generation: prefill once, decode with a key-value cache, sample, stream.

Shape legend: B batch, T positions, V vocabulary.
"""

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from moesaic.config import Options
from moesaic.model.attention import KVCache
from moesaic.model.transformer import LanguageModel


class SampleOptions(Options):
    """How the next token is drawn. Temperature 0 is greedy; top_k and top_p cut the tail first."""

    temperature: float = Field(1.0, ge=0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)


def stream(
    model: LanguageModel,
    ids_BT: Tensor,
    max_new_tokens: int,
    options: SampleOptions | None = None,
    *,
    real_BT: Tensor | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 [B], up to ``max_new_tokens`` times.

    ``ids_BT`` are prompts of equal length, or padded on the left with ``real_BT`` False there.
    Past ``config.context`` positions the window slides by one token: its oldest token is forgotten
    and the rest is computed anew, since every remaining position has moved. Without the cache
    every token is computed from the whole window, which gives the same logits (a test compares
    them). Raises ValueError for an empty prompt.
    """
    options = options or SampleOptions()
    if ids_BT.shape[1] == 0:
        raise ValueError("a prompt needs at least one token")
    was_training = model.training
    model.eval()
    try:
        yield from _stream(model, ids_BT, max_new_tokens, options, real_BT, use_cache)
    finally:
        model.train(was_training)


@torch.inference_mode()
def _stream(
    model: LanguageModel,
    ids_BT: Tensor,
    max_new_tokens: int,
    options: SampleOptions,
    real_BT: Tensor | None,
    use_cache: bool,
) -> Iterator[Tensor]:
    context = model.config.context
    generator = _generator(options.seed, ids_BT.device)
    window_BT = ids_BT[:, -context:]
    real_BT = None if real_BT is None else real_BT[:, -context:]
    cache: KVCache | None = None
    fresh_BT = window_BT
    for _ in range(max_new_tokens):
        if cache is None or cache.length + fresh_BT.shape[1] > context:
            capacity = min(context, window_BT.shape[1] + max_new_tokens)
            cache = model.new_cache(len(ids_BT), capacity) if use_cache else None
            fresh_BT, fresh_real_BT = window_BT, real_BT
        else:
            fresh_real_BT = None if real_BT is None else real_BT[:, -fresh_BT.shape[1] :]
        hidden_BTD = model(fresh_BT, fresh_real_BT, cache, logits=False).hidden_BTD
        next_B = sample(model.lm_head(hidden_BTD[:, -1]).float(), options, generator)
        yield next_B
        fresh_BT = next_B[:, None]
        window_BT = torch.cat([window_BT, fresh_BT], dim=1)[:, -context:]
        if real_BT is not None:
            real_BT = torch.cat([real_BT, torch.ones_like(fresh_BT, dtype=torch.bool)], dim=1)[:, -context:]


def sample(logits_BV: Tensor, options: SampleOptions, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row from float32 logits; int64 [B]."""
    if options.temperature == 0:
        return logits_BV.argmax(-1)
    # From the maximum down, and by no less than float32 can divide by: a tiny temperature is greedy, not NaN.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / max(options.temperature, 1e-30)
    if options.top_k is not None and options.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(options.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    probs_BV = logits_BV.softmax(-1)
    if options.top_p is not None and options.top_p < 1:
        sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True)
        # A token stays while the mass before it is below top_p, so the first always stays.
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= options.top_p
        probs_BV = probs_BV.scatter(1, order_BV, sorted_BV.masked_fill(outside_BV, 0.0))
    return torch.multinomial(probs_BV, 1, generator=generator)[:, 0]


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    if seed is None:
        return None
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return generator
