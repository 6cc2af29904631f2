"""Token ids on disk: one memory-mapped shard per domain, and the batches drawn from them.

Shape suffixes: B rows of a batch, T positions of a row, D domains.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError

if TYPE_CHECKING:  # torch is imported where tensors are made: preparing data does not need it
    from torch import Tensor

FORMAT = 2
IGNORED = -100  # the target that torch's cross-entropy leaves out by default
Split = Literal["train", "val"]
_TOLD = ("domain", "file", "sha256", "documents", "tokens", "train_tokens", "train_bytes", "val_bytes")


@dataclass(frozen=True)
class Shard:
    """One domain's file of token ids: the first ``train_tokens`` are for training, the rest validation.

    Bytes are UTF-8 bytes of the text, for bits per byte; a shard of another tokenizer kind than char,
    byte or BPE may miscount a few at the split.
    """

    domain: str
    file: str
    sha256: str
    documents: int
    tokens: int
    train_tokens: int
    train_bytes: int
    val_bytes: int
    ends: str  # the file that says where each document ends, int64, in tokens
    ends_sha256: str
    dropped: dict[str, int]  # documents left out (cleaning.py), by reason


class Windows(NamedTuple):
    """Inputs and the token that each should predict, int64 [B, T], on the CPU; a target of -100 is not
    predicted. ``real_BT`` is False at padding, None where there is none; ``document_BT`` numbers the
    documents that are packed into a row, None where each row is one. ``reference_B`` is what a reference
    model gives the predicted tokens of a row, in nats (preferences.py)."""

    ids_BT: "Tensor"
    target_BT: "Tensor"
    real_BT: "Tensor | None" = None
    document_BT: "Tensor | None" = None
    reference_B: "Tensor | None" = None

    def first(self, rows: int) -> "Windows":
        """The first ``rows`` of them."""
        real, document, reference = (None if value is None else value[:rows] for value in self[2:])
        return Windows(self.ids_BT[:rows], self.target_BT[:rows], real, document, reference)


class Part(Protocol):
    """What is told of one domain: its name, its tokens that are predicted, those of them for training."""

    @property
    def domain(self) -> str: ...
    @property
    def tokens(self) -> int: ...
    @property
    def train_tokens(self) -> int: ...


class Store(Protocol):
    """What a run reads: token ids in domains, some of each held out. TokenStore (text on disk) and
    ExampleStore (conversations, examples.py) are two."""

    tokenizer: Tokenizer
    notes: list[str]
    fingerprint: str
    train_tokens: int

    @property
    def domains(self) -> list[str]: ...
    @property
    def shards(self) -> Sequence[Part]: ...
    def batch(
        self, seed: int, step: int, batch_size: int, seq_len: int, domain: str | None = None
    ) -> Windows:
        """The training batch of a step, of one domain or of all; it depends on the arguments alone."""
        ...

    def rows_per_epoch(self, seed: int, seq_len: int) -> int:
        """How many rows of batches show all of it once, or as many tokens as it has."""
        ...

    def validation(self, batch_size: int, seq_len: int, domain: str | None = None) -> Iterator[Windows]:
        """What is held out, in order, each token that is predicted once."""
        ...

    def bytes_per_token(self, split: Split, domain: str | None = None) -> float:
        """UTF-8 bytes of text per token that is predicted."""
        ...


class TokenStore:
    """Token ids on disk, split into training and validation, read through memory maps.

    ``notes`` holds sentences about what was left out, and grows when a draw leaves out more.
    ``fingerprint`` tells the same tokens, from whatever file and in whatever cache, from all others.
    ``weights`` are the domains' shares of the training windows; not given, every position is as likely.
    ``document_mask`` numbers the documents of each window, so that attention stops at their borders.
    """

    def __init__(
        self, folder: Path, weights: dict[str, float] | None = None, document_mask: bool = False
    ) -> None:
        """Open and check a store that ``prepare`` wrote. Raises DataError for a damaged file, and for weights
        of other domains."""
        self.folder = folder
        meta = _read_meta(folder)
        # Of what is trained on, so that it stays the same when a store learns to say more.
        told = [{key: entry[key] for key in _TOLD} for entry in meta["domains"]]
        self.fingerprint = checksum_of({"tokenizer": meta["tokenizer_sha256"], "shards": told})
        _check_file(folder / "tokenizer.json", meta["tokenizer_sha256"])
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.shards = [Shard(**entry) for entry in meta["domains"]]
        self.domains: list[str] = [shard.domain for shard in self.shards]
        if weights is not None and set(weights) != set(self.domains):
            odd = sorted(set(weights) ^ set(self.domains))
            raise DataError(f"data.weights: {odd[0]!r} is in the weights or in the corpus, but not in both")
        if weights is not None:
            self.fingerprint = checksum_of({"tokens": self.fingerprint, "weights": weights})
        if document_mask:
            self.fingerprint = checksum_of({"tokens": self.fingerprint, "document_mask": True})
        self._weight_D = None if weights is None else np.array([weights[d] for d in self.domains])
        self.notes: list[str] = meta["notes"]
        self.train_tokens = sum(shard.train_tokens for shard in self.shards)
        self.val_tokens = sum(shard.tokens - shard.train_tokens for shard in self.shards)
        self._train: list[NDArray[Any]] = []
        self._val: list[NDArray[Any]] = []
        self._ends: list[NDArray[np.int64]] | None = [] if document_mask else None
        self._starts: dict[int, NDArray[np.int64]] = {}
        for shard in self.shards:
            path = folder / shard.file
            _check_file(path, shard.sha256, shard.tokens * np.dtype(meta["dtype"]).itemsize)
            ids = np.asarray(np.memmap(path, meta["dtype"], mode="r"))
            self._train.append(ids[: shard.train_tokens])
            self._val.append(ids[shard.train_tokens :])
            ends = folder / shard.ends
            _check_file(ends, shard.ends_sha256, shard.documents * 8)
            if self._ends is not None:
                self._ends.append(np.asarray(np.memmap(ends, np.int64, mode="r")))

    def batch(
        self, seed: int, step: int, batch_size: int, seq_len: int, domain: str | None = None
    ) -> Windows:
        """Random windows of the training part.

        Starts are uniform over every position of every domain with room for T + 1 tokens, or of a domain that
        was drawn by its weight. The result depends on the arguments alone, so a resumed run needs to replay
        nothing. Raises DataError when no domain is long enough.
        """
        import torch

        domain_B, start_B = self._draw(seed, step, batch_size, seq_len, domain)
        pairs = list(zip(domain_B.tolist(), start_B.tolist(), strict=True))
        rows = np.stack([self._train[domain][start : start + seq_len + 1] for domain, start in pairs])
        window_BT1 = torch.from_numpy(rows.astype(np.int64))
        document = None if self._ends is None else np.stack([self._documents(*p, seq_len) for p in pairs])
        return Windows(
            window_BT1[:, :-1].contiguous(),
            window_BT1[:, 1:].contiguous(),
            document_BT=None if document is None else torch.from_numpy(document),
        )

    def _documents(self, domain: int, start: int, size: int) -> NDArray[np.int64]:
        """The number of the document, from 1, that each of ``size`` tokens from ``start`` belongs to."""
        assert self._ends is not None
        ends = self._ends[domain]
        first, last = np.searchsorted(ends, [start, start + size - 1], side="right")
        inside = ends[first : last + 1]
        within: NDArray[np.int64] = np.searchsorted(inside, np.arange(start, start + size), side="right")
        return within + np.int64(1 + first)

    def rows_per_epoch(self, seed: int, seq_len: int) -> int:
        """Windows with as many tokens as there are to train on."""
        return max(1, self.train_tokens // seq_len)

    def _draw(
        self, seed: int, step: int, batch_size: int, seq_len: int, domain: str | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts_D = self._starts.get(seq_len)
        if starts_D is None:
            starts_D = self._starts[seq_len] = self._valid_starts(seq_len)
        if domain is not None:
            only_D = np.array([float(name == domain) for name in self.domains])
            return self._draw_weighted(starts_D, generator_of(seed, step), batch_size, only_D)
        if self._weight_D is not None:
            return self._draw_weighted(starts_D, generator_of(seed, step), batch_size, self._weight_D)
        end_D = starts_D.cumsum()
        position_B = generator_of(seed, step).integers(0, end_D[-1], batch_size)
        domain_B = np.searchsorted(end_D, position_B, side="right")
        return domain_B, position_B - (end_D - starts_D)[domain_B]

    def _draw_weighted(
        self,
        starts_D: NDArray[np.int64],
        generator: np.random.Generator,
        batch_size: int,
        weight_D: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        share_D = weight_D * (starts_D > 0)  # a domain without a window has nothing to give
        if not share_D.any():
            raise DataError("no domain that is to be drawn from is as long as train.seq_len; lower that")
        domain_B = generator.choice(len(share_D), batch_size, p=share_D / share_D.sum())
        return domain_B, generator.integers(0, starts_D[domain_B])

    def _valid_starts(self, seq_len: int) -> NDArray[np.int64]:
        starts_D = np.array([max(0, len(ids) - seq_len) for ids in self._train], np.int64)
        if not starts_D.any():
            raise self._too_short("training", self._train, seq_len, "smaller")
        for shard, starts in zip(self.shards, starts_D, strict=True):
            if not starts:
                self.notes.append(
                    f"domain {shard.domain} has {shard.train_tokens:,} training tokens, too few for a window "
                    f"of train.seq_len={seq_len} and the token after it; it is not trained on"
                )
        return starts_D

    def validation(self, batch_size: int, seq_len: int, domain: str | None = None) -> Iterator[Windows]:
        """The validation part in order, at most ``batch_size`` windows at once.

        Windows do not overlap: every token but the first of a domain is a target exactly once. What a
        domain's last window lacks has input 0 and target -100. Raises DataError at once for an unknown
        domain and for a part that is too short.
        """
        parts = dict(zip(self.domains, self._val, strict=True))
        if domain is not None and domain not in parts:
            raise DataError(f"no domain {domain!r}; there are: {', '.join(self.domains)}")
        if max(map(len, self._val)) <= seq_len:
            raise self._too_short("validation", self._val, seq_len, "larger")
        if domain is not None and len(parts[domain]) < 2:
            raise DataError(f"domain {domain} has a single validation token; make data.val_fraction larger")
        chosen = range(len(self.domains)) if domain is None else [self.domains.index(domain)]
        return self._windows(list(chosen), batch_size, seq_len)

    def _windows(self, domains: list[int], batch_size: int, seq_len: int) -> Iterator[Windows]:
        import torch

        places = [(d, start) for d in domains for start in range(0, len(self._val[d]) - 1, seq_len)]
        for first in range(0, len(places), batch_size):
            rows = places[first : first + batch_size]
            input_BT = np.zeros((len(rows), seq_len), np.int64)
            target_BT = np.full((len(rows), seq_len), IGNORED, np.int64)
            document_BT = np.zeros((len(rows), seq_len), np.int64)
            for row, (domain, start) in enumerate(rows):
                window = self._val[domain][start : start + seq_len + 1]
                size = len(window) - 1
                input_BT[row, :size], target_BT[row, :size] = window[:-1], window[1:]
                if self._ends is not None:
                    whole = self.shards[domain].train_tokens + start
                    document_BT[row, :size] = self._documents(domain, whole, size)
            real_BT = target_BT != IGNORED
            real = None if real_BT.all() else torch.from_numpy(real_BT)
            document = None if self._ends is None else torch.from_numpy(document_BT)
            yield Windows(torch.from_numpy(input_BT), torch.from_numpy(target_BT), real, document)

    def bytes_per_token(self, split: Split, domain: str | None = None) -> float:
        """UTF-8 bytes of text per token, end-of-document tokens included, in one domain or in all.

        Nats per token divided by this and by ln 2 are bits per byte.
        """
        shards = [shard for shard in self.shards if domain in (None, shard.domain)]
        if split == "train":
            size, tokens = sum(s.train_bytes for s in shards), sum(s.train_tokens for s in shards)
        else:
            size, tokens = sum(s.val_bytes for s in shards), sum(s.tokens - s.train_tokens for s in shards)
        if not tokens:
            raise DataError(f"the {split} part of {domain or 'this corpus'} holds no tokens")
        return size / tokens

    @staticmethod
    def _too_short(what: str, parts: list[NDArray[Any]], seq_len: int, mend: str) -> DataError:
        return DataError(
            f"the {what} part holds {sum(map(len, parts)):,} tokens, {max(map(len, parts)):,} in its longest "
            f"domain, but a window of train.seq_len={seq_len} needs {seq_len + 1:,}; make train.seq_len "
            f"smaller, data.val_fraction {mend}, or the corpus longer"
        )


def generator_of(seed: int, step: int) -> np.random.Generator:
    """The randomness of one step. Philox is a function of its key, so any step is reached without drawing
    those before it."""
    key = np.array([seed % 2**64, step % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        checksum = meta.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{folder / 'meta.json'}: missing or damaged") from None
    if checksum != checksum_of(meta) or meta["format"] != FORMAT:
        raise DataError(f"{folder / 'meta.json'}: damaged, or written by another version")
    return dict(meta)


def checksum_of(meta: dict[str, Any]) -> str:
    """SHA-256 of a table as sorted JSON."""
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, sha256: str, size: int | None = None) -> None:
    try:
        sound = size in (None, path.stat().st_size) and sha256_of(path) == sha256
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not sound:
        raise DataError(f"{path}: damaged: its size or SHA-256 is not the recorded one")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
