"""Models on files of one's own that they were not trained on: loss, bits per byte, answers word for word.

Of a conversation only what the assistant says is predicted; of a text all of it. Bits per byte do not depend
on the tokenizer, so that models with different ones can be compared.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.analysis.answers import greedy_answers
from moesaic.analysis.compare import Documents, losses_of
from moesaic.data.chat import PLAIN_TEMPLATE, ChatTemplate, load_template
from moesaic.data.examples import Coded
from moesaic.data.instructions import Example, read_examples, tokens_of
from moesaic.errors import DataError, RecipeError
from moesaic.lm import LM

Metrics = dict[str, float]
Sums = NDArray[np.float64]


@dataclass(frozen=True)
class OwnData:
    """Files by name. ``limit`` rows of each at most; ``answers``: so many tokens of an answer to the last
    turn of every conversation, greedy, count as right where they are its words; None asks for none.
    ``window`` tokens are read at once, at most the model's context."""

    files: Mapping[str, Path]
    limit: int | None = None
    answers: int | None = None
    window: int = 1024

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """The rows of each file, whatever domain they say they are of. Raises DataError naming file and line,
        and RecipeError where answers are wanted and there is no conversation."""
        found = {name: list(islice(read_examples(path), self.limit)) for name, path in self.files.items()}
        talks = any(example.messages for rows in found.values() for example in rows)
        if self.answers is not None and not talks:
            raise RecipeError("--answers: no file of --data holds a conversation to answer")
        return found

    def run(self, lm: LM, say: Callable[[str], None]) -> dict[str, Metrics]:
        """The metrics of each file, with standard errors over its rows where it has more than one. Raises as
        ``examples``, DataError for a file that gives nothing to predict, RecipeError for answers that leave
        no room for a prompt."""
        if self.answers is not None and self.answers >= lm.config.context:
            raise RecipeError(
                f"--answers {self.answers}: {lm.path} reads {lm.config.context} tokens, which leaves no room "
                "for a question; ask for fewer"
            )
        results = {}
        for name, examples in self.examples.items():
            say(f"{name}: {len(examples):,} rows")
            metrics = {**self._losses(lm, examples, self.files[name]), **self._answers(lm, examples)}
            results[name] = {key: value for key, value in metrics.items() if not math.isnan(value)}
        return results

    def _losses(self, lm: LM, examples: list[Example], path: Path) -> Metrics:
        window, template = min(self.window, lm.config.context), load_template(lm.path)
        pieces: list[Coded] = []
        row_of_piece, bytes_of_row = [], []
        for row, example in enumerate(examples):
            ids, learnt = tokens_of(example, lm.tokenizer, template)
            if not example.messages and lm.tokenizer.eos_id is not None:  # so that the first is predicted too
                ids, learnt = np.insert(ids, 0, lm.tokenizer.eos_id), np.insert(learnt, 0, False)
            bytes_of_row.append(lm.tokenizer.byte_length(ids[1:][learnt[1:]]))
            for start in range(0, len(ids) - 1, window):
                piece = ids[start : start + window + 1], learnt[start : start + window + 1]
                if piece[1][1:].any():
                    pieces.append(piece)
                    row_of_piece.append(row)
        if not pieces:
            raise DataError(f"{path}: gives nothing to predict")
        documents = Documents(["all"], pieces, np.zeros(len(pieces), np.int64))
        sums, counts = losses_of(lm.model, documents, window)
        rows = len(examples)
        nats = np.bincount(row_of_piece, sums, rows).astype(np.float64)
        tokens = np.bincount(row_of_piece, counts, rows).astype(np.float64)
        bits = nats / math.log(2)
        loss, loss_error = _ratio(nats, tokens)
        per_byte, byte_error = _ratio(bits, np.array(bytes_of_row, np.float64))
        return {
            "loss": loss,
            "loss stderr": loss_error,
            "bits_per_byte": per_byte,
            "bits_per_byte stderr": byte_error,
            "tokens": float(tokens.sum()),
            "samples": float(rows),
        }

    def _answers(self, lm: LM, examples: list[Example]) -> Metrics:
        asked = [example for example in examples if example.messages]
        if self.answers is None or not asked:
            return {}
        template = load_template(lm.path) or ChatTemplate(PLAIN_TEMPLATE)
        prompts, wanted = [], []
        for example in asked:
            last = max(n for n, message in enumerate(example.messages) if message["role"] == "assistant")
            text = template.render(example.messages[:last], answer=True)
            prompts.append(lm.tokenizer.encode(text).tolist())
            wanted.append(example.messages[last]["content"].strip())
        given = greedy_answers(lm, prompts, lm.config.context, self.answers)
        right = np.array([answer.strip() == words for answer, words in zip(given, wanted, strict=True)])
        error = float(right.std(ddof=1) / math.sqrt(len(right))) if len(right) > 1 else math.nan
        return {"exact_match": float(right.mean()), "exact_match stderr": error}


def _ratio(numerator: Sums, denominator: Sums) -> tuple[float, float]:
    """The ratio of two sums over rows, and its standard error (Cochran 1977, section 6.4)."""
    total = float(denominator.sum())
    ratio = float(numerator.sum()) / total
    rows = len(numerator)
    residual = numerator - ratio * denominator
    error = math.sqrt(float((residual**2).sum()) * rows / max(1, rows - 1)) / total
    return ratio, error if rows > 1 else math.nan
