"""Greedy answers to many prompts: what they share is read once, and they are continued side by side.

Shape legend: B prompts that are still being answered.
"""

from collections.abc import Callable, Sequence

import torch

from moesaic.analysis.contexts import Tokens, batches, read, read_shared, runs
from moesaic.data.tokenizers import StreamDecoder
from moesaic.lm import LM
from moesaic.model.attention import KVCache


@torch.inference_mode()
def greedy_answers(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    context: int,
    most: int,
    stop: Sequence[str] = (),
    done: Callable[[int], None] | None = None,
) -> list[str]:
    """The likeliest continuation of each prompt, token by token: at most ``most`` tokens, up to any of the
    ``stop`` texts or the end of the text, neither of which is part of it.

    Of a prompt that leaves no room for them in ``context`` tokens, the beginning is cut off. ``done`` is
    told how many prompts have been answered since it was last called. Raises ValueError for an empty prompt.
    """
    lm.model.eval()
    room = max(1, context - most)
    kept = [tuple(prompt)[-room:] for prompt in prompts]
    if not all(kept):
        raise ValueError("a prompt needs at least one token")
    answers = ["" for _ in prompts]
    for run in runs(kept):
        cache = read_shared(lm.model, kept[run.numbers[0]][: run.shared])
        rests = [kept[n][run.shared :] for n in run.numbers]
        for places in batches(lm.model, rests, run.shared, [most // 8] * len(rests)):
            _answer(
                lm, cache, [rests[n] for n in places], [run.numbers[n] for n in places], most, stop, answers
            )
            if done is not None:
                done(len(places))
    return answers


def _answer(
    lm: LM,
    shared: KVCache | None,
    rests: list[Tokens],
    numbers: list[int],
    most: int,
    stop: Sequence[str],
    answers: list[str],
) -> None:
    """Write the answers to ``numbers`` into ``answers``; those that have ended are not carried further."""
    writers = {number: _Writer(lm, stop) for number in numbers}
    hidden_BD, cache = read(lm.model, shared, rests, most)
    assert cache is not None
    for left in range(most, 0, -1):
        next_B = lm.model.lm_head(hidden_BD).float().argmax(-1)
        goes_on = [writers[n].push(int(token)) for n, token in zip(numbers, next_B, strict=True)]
        if left == 1 or not any(goes_on):
            break
        if sum(goes_on) <= len(goes_on) // 2:
            alive = torch.tensor([b for b, on in enumerate(goes_on) if on], device=next_B.device)
            cache, next_B = cache.of_rows(alive), next_B[alive]
            numbers = [n for n, on in zip(numbers, goes_on, strict=True) if on]
        hidden_BD = lm.model(next_B[:, None], cache=cache, logits=False).hidden_BTD[:, -1]
    for number, writer in writers.items():
        answers[number] = writer.text()


class _Writer:
    """One answer as it comes."""

    def __init__(self, lm: LM, stop: Sequence[str]) -> None:
        self._ends = {*lm.stop_ids, *([] if lm.tokenizer.eos_id is None else [lm.tokenizer.eos_id])}
        self._stop = [text for text in stop if text]
        self._decoder, self._text, self._over = StreamDecoder(lm.tokenizer), "", False

    def push(self, token: int) -> bool:
        """Take the next token; whether the answer goes on after it."""
        if self._over:
            return False
        if token in self._ends:
            self._over = True
        else:
            self._text += self._decoder.push(token)
            self._over = self._cut() is not None
        return not self._over

    def _cut(self) -> int | None:
        """Where the first stop text begins, if there is one."""
        return min((self._text.find(s) for s in self._stop if s in self._text), default=None)

    def text(self) -> str:
        whole = self._text
        if self._cut() is None:
            self._text = whole = whole + self._decoder.flush()
        return whole[: self._cut()]
