"""How likely a model finds continuations of contexts, for evaluation: each context is read once.

The answers to one question share its text, so the text goes through the model once, and every answer
continues from the cache; an answer of one token needs no second pass at all. Contexts of like length go
together.

Shape legend: B contexts of a batch, T their tokens, R continuations, N their tokens but the last, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.model.attention import KVCache
from moesaic.model.transformer import LanguageModel

_BATCH_TOKENS = 2048
_MOST_LOGITS = 2**24


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding would have given it."""

    logprob: float
    greedy: bool


Pair = tuple[Sequence[int], Sequence[int]]  # a context, not empty, and what follows it
Group = tuple[
    tuple[int, ...], list[tuple[int, tuple[int, ...]]]
]  # a context; numbers and continuations of pairs


@torch.inference_mode()
def score(
    model: LanguageModel, pairs: Sequence[Pair], context: int, done: Callable[[int], None] | None = None
) -> list[Score]:
    """A score for every pair; of one that is longer than ``context`` + 1 tokens the beginning is cut off.

    ``done`` is told how many pairs have been scored since it was last called.
    """
    model.eval()
    groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    scores: dict[int, Score] = {}
    for number, (before, after) in enumerate(pairs):
        whole = (*before, *after)[-(context + 1) :]
        kept = tuple(after)[-(len(whole) - 1) :] if after else ()
        if not kept:  # nothing is certain to follow
            scores[number] = Score(0.0, True)
            continue
        groups.setdefault(whole[: len(whole) - len(kept)], []).append((number, kept))
    # With learned positions there is no room past the context, not even for another's padding; and a short
    # convolution would remember padding for a shorter context's last tokens.
    alone = model.config.position == "learned" or bool(model.config.conv)
    batch: list[Group] = []
    for group in _pieces(groups):
        if batch and (alone or _tokens([*batch, group]) > _BATCH_TOKENS):
            _score_batch(model, batch, scores, done)
            batch = []
        batch.append(group)
    if batch:
        _score_batch(model, batch, scores, done)
    return [scores[number] for number in range(len(pairs))]


def _pieces(groups: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]) -> Iterator[Group]:
    """The contexts, the longest first, those with very many continuations more than once."""
    for prefix in sorted(groups, key=lambda tokens: (-len(tokens), tokens)):
        members = sorted(groups[prefix], key=lambda member: len(member[1]))
        start = 0
        while start < len(members):
            end = start + 1
            while end < len(members) and _tokens([(prefix, members[start : end + 1])]) <= 4 * _BATCH_TOKENS:
                end += 1
            yield prefix, members[start:end]
            start = end


def _tokens(batch: Sequence[Group]) -> int:
    """How many tokens a batch puts through the model: contexts, and continuations where they are longer than
    one token."""
    prefix = max(len(prefix) for prefix, _ in batch)
    more = max(len(tokens) for _, members in batch for _, tokens in members) - 1
    rows = sum(len(members) for _, members in batch)
    return len(batch) * prefix + (rows * (prefix // 4 + more) if more else 0)


def _score_batch(
    model: LanguageModel,
    batch: list[Group],
    scores: dict[int, Score],
    done: Callable[[int], None] | None,
) -> None:
    device = model.lm_head.weight.device
    ids_BT, real_BT = _padded([prefix for prefix, _ in batch], device)
    rows = [(b, number, tokens) for b, (_, members) in enumerate(batch) for number, tokens in members]
    more = max(len(tokens) for _, _, tokens in rows) - 1
    cache: KVCache | None = None
    if more:
        cache = model.new_cache(len(batch), ids_BT.shape[1] + more)
    hidden_BTD = model(ids_BT, None if real_BT.all() else real_BT, cache, logits=False).hidden_BTD
    last_BD = hidden_BTD[torch.arange(len(batch)), real_BT.sum(1) - 1]
    row_R = torch.tensor([b for b, _, _ in rows], device=device)
    hidden_R1D = last_BD[row_R][:, None]
    if cache is not None:
        rest_RN, real_RN = _padded([tokens[:-1] for _, _, tokens in rows], device, more)
        past = cache.of_rows(row_R)
        rest = model(rest_RN, None if real_RN.all() and not past.padded else real_RN, past, logits=False)
        hidden_R1D = torch.cat([hidden_R1D, rest.hidden_BTD], dim=1)
    step = max(1, _MOST_LOGITS // (model.config.vocabulary * hidden_R1D.shape[1]))
    for start in range(0, len(rows), step):
        logits = model.lm_head(hidden_R1D[start : start + step]).float().log_softmax(-1).cpu()
        for row, (_, number, tokens) in zip(logits, rows[start : start + step], strict=True):
            wanted = torch.tensor(tokens)
            picked = row[torch.arange(len(tokens)), wanted]
            greedy = bool((row[: len(tokens)].argmax(-1) == wanted).all())
            scores[number] = Score(float(picked.double().sum()), greedy)
    if done is not None:
        done(len(rows))


def _padded(
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
