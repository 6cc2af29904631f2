"""Contexts read through a model: what many of them begin with goes through it once, the rest side by side.

The questions of a task share its examples; the answers to a question share all of it. Contexts of like length
go together, padded on the right.

Shape legend: B contexts of a batch, T tokens of their rests, D width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from moesaic.model.attention import KVCache
from moesaic.model.transformer import LanguageModel

BATCH_TOKENS = 2048
_LEAST_SHARED = 32  # tokens: fewer cost less than a pass of their own

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Contexts, by number, that begin with the same ``shared`` tokens; each has more than these."""

    numbers: list[int]
    shared: int


def runs(contexts: Sequence[Tokens]) -> list[Run]:
    """The contexts in runs: those that share a beginning worth a pass of its own, and one run of all others,
    which shares nothing. In each the longest come first."""
    order = sorted(range(len(contexts)), key=lambda n: contexts[n])
    found: list[Run] = []
    single: list[int] = []
    start = 0
    while start < len(order):
        end, shared = start + 1, len(contexts[order[start]]) - 1
        while end < len(order):
            common = min(shared, _common(contexts[order[start]], contexts[order[end]]))
            common = min(common, len(contexts[order[end]]) - 1)
            # One more shortens what all share: it belongs to the run if more is saved with it than without.
            if common < _LEAST_SHARED or common * (end - start) < shared * (end - start - 1):
                break
            end, shared = end + 1, common
        if end - start > 1:
            found.append(Run(order[start:end], shared))
        else:
            single.append(order[start])
        start = end
    for run in (*found, Run(single, 0)):
        run.numbers.sort(key=lambda n: (-len(contexts[n]), contexts[n]))
    return [*found, Run(single, 0)] if single else found


def _common(a: Tokens, b: Tokens) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def reads_alone(model: LanguageModel) -> bool:
    """Whether contexts of unequal length cannot go together. With learned positions there is no room past the
    context, not even for another's padding; and a short convolution would remember padding for a shorter
    context's last tokens."""
    return model.config.position == "learned" or bool(model.config.conv)


def batches(
    model: LanguageModel, rests: Sequence[Tokens], shared: int, more: Sequence[int]
) -> Iterator[list[int]]:
    """Places of rests to read together, in order; ``more`` tokens of each follow it, as many as it has."""
    batch: list[int] = []
    for place in range(len(rests)):
        wider = [*batch, place]
        # The copy of what is shared costs memory, not products: an eighth of its tokens.
        tokens = len(wider) * (max(len(rests[n]) for n in wider) + shared // 8) + sum(more[n] for n in wider)
        if batch and (reads_alone(model) or tokens > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def read_shared(model: LanguageModel, tokens: Tokens) -> KVCache | None:
    """What is remembered of the beginning of a run; None where it is empty."""
    if not tokens:
        return None
    cache = model.new_cache(1, len(tokens))
    model(torch.tensor([tokens], device=model.lm_head.weight.device), cache=cache, logits=False)
    return cache


def read(
    model: LanguageModel, shared: KVCache | None, rests: Sequence[Tokens], more: int
) -> tuple[Tensor, KVCache | None]:
    """The hidden state after each context [B, D], and what is remembered of them, with room for ``more``
    tokens; None where none follow and nothing was remembered."""
    device = model.lm_head.weight.device
    ids_BT, real_BT = padded(rests, device)
    capacity = ids_BT.shape[1] + more
    cache: KVCache | None = None
    if shared is not None:
        row_B = torch.zeros(len(rests), dtype=torch.int64, device=device)
        cache = shared.of_rows(row_B, shared.length + capacity)
    elif more:
        cache = model.new_cache(len(rests), capacity)
    hidden_BTD = model(ids_BT, None if real_BT.all() else real_BT, cache, logits=False).hidden_BTD
    return hidden_BTD[torch.arange(len(rests)), real_BT.sum(1) - 1], cache


def padded(
    texts: Sequence[Sequence[int]], device: torch.device, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and which of them are real, padded on the right."""
    longest = max(map(len, texts)) if width is None else width
    ids_BT = torch.zeros(len(texts), longest, dtype=torch.int64)
    real_BT = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)] = torch.tensor(text, dtype=torch.int64)
        real_BT[row, : len(text)] = True
    return ids_BT.to(device), real_BT.to(device)
