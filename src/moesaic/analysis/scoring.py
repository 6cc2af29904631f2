"""How likely a model finds continuations of contexts, for evaluation: each context is read once.

The answers to one question share its text, so the text goes through the model once, and every answer
continues from what is remembered; an answer of one token needs no second pass at all.

Shape legend: B contexts of a batch, R continuations, N their tokens but the last, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moesaic.analysis.contexts import BATCH_TOKENS, Tokens, batches, padded, read, read_shared, runs
from moesaic.model.attention import KVCache
from moesaic.model.transformer import LanguageModel

_MOST_LOGITS = 2**24


@dataclass(frozen=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding would have given it."""

    logprob: float
    greedy: bool


Pair = tuple[Sequence[int], Sequence[int]]  # a context, not empty, and what follows it
Member = tuple[int, Tokens]  # the number of a pair, and its continuation
Group = tuple[Tokens, list[Member]]  # a context, and what follows it


@torch.inference_mode()
def score(
    model: LanguageModel, pairs: Sequence[Pair], context: int, done: Callable[[int], None] | None = None
) -> list[Score]:
    """A score for every pair; of one that is longer than ``context`` + 1 tokens the beginning is cut off.

    ``done`` is told how many pairs have been scored since it was last called.
    """
    model.eval()
    members: dict[Tokens, list[Member]] = {}
    scores: dict[int, Score] = {}
    for number, (before, after) in enumerate(pairs):
        whole = (*before, *after)[-(context + 1) :]
        kept = tuple(after)[-(len(whole) - 1) :] if after else ()
        if not kept:  # nothing is certain to follow
            scores[number] = Score(0.0, True)
            continue
        members.setdefault(whole[: len(whole) - len(kept)], []).append((number, kept))
    groups = list(_pieces(members))
    for run in runs([context for context, _ in groups]):
        chosen = [groups[n] for n in run.numbers]
        cache = read_shared(model, chosen[0][0][: run.shared])
        rests = [context[run.shared :] for context, _ in chosen]
        more = [_more(following, len(context)) for context, following in chosen]
        for places in batches(model, rests, run.shared, more):
            batch = [(rests[n], chosen[n][1]) for n in places]
            _score_batch(model, cache, batch, scores)
            if done is not None:
                done(sum(len(following) for _, following in batch))
    return [scores[number] for number in range(len(pairs))]


def _pieces(members: dict[Tokens, list[Member]]) -> Iterator[Group]:
    """The contexts, those with very many continuations more than once."""
    for context, following in members.items():
        following = sorted(following, key=lambda member: len(member[1]))
        start = 0
        while start < len(following):
            end = start + 1
            while (
                end < len(following) and _more(following[start : end + 1], len(context)) <= 4 * BATCH_TOKENS
            ):
                end += 1
            yield context, following[start:end]
            start = end


def _more(members: Sequence[Member], context: int) -> int:
    """What the continuations of a context cost, in tokens: nothing where each has one, else their own and a
    part of what is remembered for each."""
    longest = max(len(tokens) for _, tokens in members) - 1
    return len(members) * (context // 4 + longest) if longest else 0


def _score_batch(
    model: LanguageModel, shared: KVCache | None, batch: list[Group], scores: dict[int, Score]
) -> None:
    device = model.lm_head.weight.device
    rows = [(b, number, tokens) for b, (_, members) in enumerate(batch) for number, tokens in members]
    more = max(len(tokens) for _, _, tokens in rows) - 1
    last_BD, cache = read(model, shared, [rest for rest, _ in batch], more)
    row_R = torch.tensor([b for b, _, _ in rows], device=device)
    hidden_R1D = last_BD[row_R][:, None]
    if more:
        assert cache is not None
        rest_RN, real_RN = padded([tokens[:-1] for _, _, tokens in rows], device, more)
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
