"""What is mended in a text, and which documents are left out, before a corpus becomes tokens.

A document that is left out has one reason, the first that holds; ``Cleaner.dropped`` counts them.
"""

import hashlib
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from moesaic.config import Options
from moesaic.errors import DataError

_SHINGLE = 5  # words; Lee et al. 2022 (arXiv 2107.06499) and Dolma compare 5-grams too
_HASHES = 128
# Control characters that are no white space; a form feed or a tab may be meant.
_CONTROL = dict.fromkeys([*range(0x09), 0x0B, *range(0x0E, 0x20), 0x7F])


class CleanOptions(Options):
    """Which documents are left out and what is mended in the others; nothing by default.

    ``normalise`` writes Unicode in its composed form (NFC), line ends as newlines, and no control characters.
    ``min_chars``: a document has at least so many. ``repeats``: those are left out in which some sequence of
    1 to ``period`` tokens stands this many times one after the other; OLMoE: 32 and 13 (arXiv 2409.02060,
    section 2). ``top_word``, ``top_two_words``: those of whose words more than this share are the commonest,
    or the two commonest; 0.3 and 0.5 for OLMoE's code. ``exact_duplicates``: all but the first of those with
    the same words, whatever the white space between them. ``near_duplicates``: all but the first of those
    whose sets of five-word sequences have at least this Jaccard similarity, estimated from 128 min-hashes
    (Broder 1997). Both compare with all domains read before.
    """

    normalise: bool = False
    min_chars: int = Field(0, ge=0)
    repeats: int | None = Field(None, ge=2)
    period: int = Field(13, ge=1, le=1000)
    top_word: float | None = Field(None, gt=0, le=1)
    top_two_words: float | None = Field(None, gt=0, le=1)
    exact_duplicates: bool = False
    near_duplicates: float | None = Field(None, gt=0, lt=1)


class Cleaner:
    """One pass over a corpus. It remembers what it has seen, so documents come in order, each once."""

    def __init__(self, options: CleanOptions) -> None:
        """Raises DataError where near duplicates are asked for and datasketch is not installed."""
        self.options = options
        self.dropped: Counter[str] = Counter()
        self.remembers = options.exact_duplicates or options.near_duplicates is not None
        self._seen: set[bytes] = set()
        self._near = None if options.near_duplicates is None else _NearDuplicates(options.near_duplicates)

    def text(self, text: str) -> str | None:
        """The text as it is to be tokenised, or None where it is left out."""
        if self.options.normalise:
            text = normalised(text)
        reason = self._reason(text)
        if reason is None:
            return text
        self.dropped[reason] += 1
        return None

    def keeps(self, ids: NDArray[Any]) -> bool:
        """Whether token ids [T] of a document do not repeat themselves too often."""
        least = self.options.repeats
        if least is None or repeats_at_most(ids, least - 1, self.options.period):
            return True
        self.dropped["repeat themselves"] += 1
        return False

    def _reason(self, text: str) -> str | None:
        options = self.options
        if len(text) < options.min_chars:
            return "are too short"
        # Words are split off only where something asks for them: that takes longer than reading the text.
        if not self.remembers and options.top_word is None and options.top_two_words is None:
            return None
        words = text.split()
        first, second = _commonest(words)
        if options.top_word is not None and first > options.top_word:
            return "are mostly one word"
        if options.top_two_words is not None and first + second > options.top_two_words:
            return "are mostly two words"
        if options.exact_duplicates:
            key = hashlib.sha256(" ".join(words).encode("utf-8", "surrogatepass")).digest()[:16]
            if key in self._seen:
                return "are duplicates"
            self._seen.add(key)
        if self._near is not None and self._near.known(words):
            return "are near duplicates"
        return None


def normalised(text: str) -> str:
    """The text in composed form, with newlines for line ends and without control characters."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL)
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def repeats_at_most(ids: NDArray[Any], most: int, period: int) -> bool:
    """Whether no sequence of 1 to ``period`` ids stands more than ``most`` times one after the other.

    ``n`` copies of ``p`` ids are (n - 1) · p places in a row that equal the place ``p`` before them.
    """
    for p in range(1, period + 1):
        run = most * p  # that many equal places in a row are one copy too many
        if len(ids) <= run:
            return True
        # A run of that length covers a multiple of it: one place in ``run`` says whether to look closer.
        if not (ids[p:][run - 1 :: run] == ids[:-p][run - 1 :: run]).any():
            continue
        different = np.flatnonzero(ids[p:] != ids[:-p])
        borders = np.concatenate([[-1], different, [len(ids) - p]])
        if int(np.diff(borders).max()) - 1 >= run:
            return False
    return True


def _commonest(words: list[str]) -> tuple[float, float]:
    """The shares of the two commonest words."""
    common = [count / len(words) for _, count in Counter(words).most_common(2)]
    first, second, *_ = [*common, 0.0, 0.0]
    return first, second


class _NearDuplicates:
    """Documents by their min-hashes, in buckets; candidates out of a bucket are compared."""

    def __init__(self, threshold: float) -> None:
        try:
            import datasketch
        except ImportError:
            raise DataError(
                "data.clean.near_duplicates needs datasketch: pip install 'moesaic[dedup]'"
            ) from None
        self._threshold = threshold
        self._new: Any = datasketch.MinHash
        self._buckets: Any = datasketch.MinHashLSH(threshold=threshold, num_perm=_HASHES)
        self._hashes: list[NDArray[np.uint32]] = []

    def known(self, words: list[str]) -> bool:
        """Whether one like it was seen before; one that was not is remembered."""
        last = max(1, len(words) - _SHINGLE + 1)
        shingles = {" ".join(words[i : i + _SHINGLE]).encode("utf-8", "surrogatepass") for i in range(last)}
        minhash = self._new(num_perm=_HASHES)
        minhash.update_batch(list(shingles))
        hashes = minhash.hashvalues.copy()
        for number in self._buckets.query(minhash):
            if float((self._hashes[number] == hashes).mean()) >= self._threshold:
                return True
        self._buckets.insert(len(self._hashes), minhash)
        self._hashes.append(hashes)
        return False
