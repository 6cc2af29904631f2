"""Pretraining data: a corpus tokenised once into memory-mapped shards, and batches out of them.

Shape suffixes: B rows of a batch, T positions of a row, D domains.

``prepare`` writes one shard of token ids per domain into a folder named after all that decides its
content, so that a second run opens it instead of tokenising again. The folder appears complete or not
at all: it is built under another name and renamed. Every opening checks sizes and SHA-256.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moesaic.data.corpora import Corpus, DataOptions, Document, cache_folder, open_corpus
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError, ResourceError

if TYPE_CHECKING:  # torch is imported where tensors are made: preparing data does not need it
    from torch import Tensor

FORMAT = 1
IGNORED = -100  # the target that torch's cross-entropy leaves out by default
Split = Literal["train", "val"]

_BATCH_CHARS = 1 << 20


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


def prepare(options: DataOptions, *, progress: Callable[[str], None] | None = None) -> "TokenStore":
    """The tokens of a corpus: opened when they are in the cache intact, made otherwise.

    ``progress`` is given sentences. Two preparations at once do the work twice and agree on one result.
    Raises DataError for a corpus, tokenizer or cache that cannot be used, ResourceError on a full disk.
    """
    say = progress or (lambda sentence: None)
    corpus = open_corpus(options)
    given, identity = _given_tokenizer(options)
    decides = [FORMAT, corpus.fingerprint(), identity, options.val_fraction]
    folder = cache_folder(options) / "tokens" / hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    if folder.exists():
        try:
            return TokenStore(folder)
        except DataError as error:
            say(f"{error}; it is built again")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            _build(building, corpus, given or _trained_tokenizer(options, corpus, say), options, say)
            _put_in_place(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{folder.parent}: the disk is full; make room or set data.cache") from None
        raise DataError(f"{folder.parent}: cannot be written ({error.strerror}); set data.cache") from None
    return TokenStore(folder)


def _given_tokenizer(options: DataOptions) -> tuple[Tokenizer | None, list[Any]]:
    """The tokenizer if it needs no text to train on, and what tells it from others."""
    name = options.tokenizer
    if name == "byte":
        return Tokenizer.byte(), [name]
    if name in ("char", "bpe"):
        return None, [name, options.vocab_size] if name == "bpe" else [name]
    if not Path(name).expanduser().exists():
        raise DataError(f"data.tokenizer={name}: neither char, byte, bpe nor a tokenizer.json that exists")
    tokenizer = Tokenizer.load(name)
    return tokenizer, ["file", tokenizer.fingerprint]


def _trained_tokenizer(options: DataOptions, corpus: Corpus, say: Callable[[str], None]) -> Tokenizer:
    texts = (document.text for document in corpus.documents())
    if options.tokenizer == "char":
        return Tokenizer.char(texts)
    say(f"training a BPE tokenizer of {options.vocab_size:,} tokens")
    return Tokenizer.bpe(texts, options.vocab_size)


def _build(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, options: DataOptions, say: Callable[[str], None]
) -> None:
    """Write every file of a token store; ``meta.json``, which makes it one, comes last."""
    tokenizer.save(folder / "tokenizer.json")
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    shards: list[Shard] = []
    notes: list[str] = []
    for domain in corpus.domains():
        file = _file_name(domain, {shard.file.lower() for shard in shards})
        documents = corpus.documents(domain)
        shard = _write_shard(folder / file, domain, documents, tokenizer, dtype, options.val_fraction)
        if shard.tokens:
            shards.append(shard)
            say(f"{domain}: {shard.tokens:,} tokens from {shard.documents:,} documents")
        else:
            (folder / file).unlink()
            notes.append(f"domain {domain} holds no text and is left out")
    if not shards:
        raise DataError(f"{corpus.describe()}: there is no text in it")
    if corpus.left_out:
        notes.append(corpus.describe())
    meta = {
        "format": FORMAT,
        "dtype": dtype,
        "tokenizer_sha256": _sha256_of(folder / "tokenizer.json"),
        "val_fraction": options.val_fraction,
        "notes": notes,
        "domains": [asdict(shard) for shard in shards],
    }
    with (folder / "meta.json").open("w", encoding="utf-8", newline="\n") as out:
        json.dump({**meta, "checksum": _checksum(meta)}, out, indent=1)
        _sync(out)
    os.chmod(folder, 0o755)  # a temporary folder is private, a cache may be shared
    _sync_folder(folder)


def _write_shard(
    path: Path,
    domain: str,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    dtype: str,
    val_fraction: float,
) -> Shard:
    digest, tokens = hashlib.sha256(), 0
    ends, sizes = array("q"), array("q")  # per document: tokens up to its end, bytes of its text
    with path.open("wb") as out:
        for texts in _batches(documents):
            try:
                encoded = tokenizer.encode_batch(texts)
            except DataError as error:
                where = f"documents {len(ends) + 1} to {len(ends) + len(texts)}"
                raise DataError(f"domain {domain}, {where}: {error}") from None
            for text, ids in zip(texts, encoded, strict=True):
                whole = ids if tokenizer.eos_id is None else np.append(ids, tokenizer.eos_id)
                block = whole.astype(dtype).tobytes()
                out.write(block)
                digest.update(block)
                tokens += len(whole)
                ends.append(tokens)
                sizes.append(len(text.encode("utf-8")))
        _sync(out)
    train = int(tokens * (1 - val_fraction))
    whole_documents = bisect_right(ends, train)
    start = ends[whole_documents - 1] if whole_documents else 0
    part = np.fromfile(path, dtype, count=train - start, offset=start * np.dtype(dtype).itemsize)
    train_bytes = min(sum(sizes[:whole_documents]) + tokenizer.byte_length(part), sum(sizes))
    return Shard(
        domain, path.name, digest.hexdigest(), len(ends), tokens, train, train_bytes, sum(sizes) - train_bytes
    )


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Texts by the million characters: enough for the library's threads, little for the memory."""
    texts: list[str] = []
    size = 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _file_name(domain: str, taken: set[str]) -> str:
    """A name that every file system accepts; ``taken`` holds those in use, in lower case."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", domain).lstrip(".")[:80] or "domain"
    names = (f"{safe}{suffix}.bin" for suffix in ["", *(f"-{n}" for n in range(2, len(taken) + 3))])
    return next(name for name in names if name.lower() not in taken)


def _put_in_place(building: Path, folder: Path) -> None:
    """Give a finished store its name. One that is already there stays, unless it is damaged.

    One process at a time: of two that saw the same damaged store, the second would put away what the first
    has just put in its place.
    """
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(parent, fcntl.LOCK_EX)
        if folder.exists():
            try:
                TokenStore(folder)
            except DataError:
                aside = tempfile.mkdtemp(prefix=".damaged-", dir=folder.parent)
                os.rename(folder, aside)
                shutil.rmtree(aside, ignore_errors=True)
            else:
                return
        os.rename(building, folder)
        os.fsync(parent)
    finally:
        os.close(parent)


class TokenStore:
    """Token ids on disk, split into training and validation, read through memory maps.

    ``notes`` holds sentences about what was left out, and grows when a draw leaves out more.
    """

    def __init__(self, folder: Path) -> None:
        """Open and check a store that ``prepare`` wrote; raises DataError when a file is damaged."""
        self.folder = folder
        meta = _read_meta(folder)
        _check_file(folder / "tokenizer.json", meta["tokenizer_sha256"])
        self.tokenizer = Tokenizer.load(folder / "tokenizer.json")
        self.shards = [Shard(**entry) for entry in meta["domains"]]
        self.domains: list[str] = [shard.domain for shard in self.shards]
        self.notes: list[str] = meta["notes"]
        self.train_tokens = sum(shard.train_tokens for shard in self.shards)
        self.val_tokens = sum(shard.tokens - shard.train_tokens for shard in self.shards)
        self._train: list[NDArray[Any]] = []
        self._val: list[NDArray[Any]] = []
        self._starts: dict[int, NDArray[np.int64]] = {}
        for shard in self.shards:
            path = folder / shard.file
            _check_file(path, shard.sha256, shard.tokens * np.dtype(meta["dtype"]).itemsize)
            ids = np.asarray(np.memmap(path, meta["dtype"], mode="r"))
            self._train.append(ids[: shard.train_tokens])
            self._val.append(ids[shard.train_tokens :])

    def batch(self, seed: int, step: int, batch_size: int, seq_len: int) -> "tuple[Tensor, Tensor]":
        """Random windows of the training part: inputs and targets, int64 [B, T], on the CPU.

        Starts are uniform over every position of every domain with room for T + 1 tokens. The result
        depends on the arguments alone, so a resumed run needs to replay nothing. Raises DataError when
        no domain is long enough.
        """
        import torch

        domain_B, start_B = self._draw(seed, step, batch_size, seq_len)
        pairs = zip(domain_B.tolist(), start_B.tolist(), strict=True)
        rows = np.stack([self._train[domain][start : start + seq_len + 1] for domain, start in pairs])
        window_BT1 = torch.from_numpy(rows.astype(np.int64))
        return window_BT1[:, :-1].contiguous(), window_BT1[:, 1:].contiguous()

    def batch_domains(self, seed: int, step: int, batch_size: int, seq_len: int) -> list[int]:
        """The index into ``domains`` of each row that ``batch`` gives for the same arguments."""
        domain_B, _ = self._draw(seed, step, batch_size, seq_len)
        return [int(domain) for domain in domain_B]

    def _draw(
        self, seed: int, step: int, batch_size: int, seq_len: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        starts_D = self._starts.get(seq_len)
        if starts_D is None:
            starts_D = self._starts[seq_len] = self._valid_starts(seq_len)
        end_D = starts_D.cumsum()
        # Philox is a function of its key, so any step is reached without drawing those before it.
        key = np.array([seed % 2**64, step % 2**64], np.uint64)
        position_B = np.random.Generator(np.random.Philox(key=key)).integers(0, end_D[-1], batch_size)
        domain_B = np.searchsorted(end_D, position_B, side="right")
        return domain_B, position_B - (end_D - starts_D)[domain_B]

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

    def validation(
        self, batch_size: int, seq_len: int, domain: str | None = None
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        """The validation part in order: inputs and targets, int64 [at most B, T], on the CPU.

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
        return self._windows(self._val if domain is None else [parts[domain]], batch_size, seq_len)

    @staticmethod
    def _windows(
        parts: list[NDArray[Any]], batch_size: int, seq_len: int
    ) -> "Iterator[tuple[Tensor, Tensor]]":
        import torch

        places = [(ids, start) for ids in parts for start in range(0, len(ids) - 1, seq_len)]
        for first in range(0, len(places), batch_size):
            rows = places[first : first + batch_size]
            input_BT = np.zeros((len(rows), seq_len), np.int64)
            target_BT = np.full((len(rows), seq_len), IGNORED, np.int64)
            for row, (ids, start) in enumerate(rows):
                window = ids[start : start + seq_len + 1]
                input_BT[row, : len(window) - 1] = window[:-1]
                target_BT[row, : len(window) - 1] = window[1:]
            yield torch.from_numpy(input_BT), torch.from_numpy(target_BT)

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


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        checksum = meta.pop("checksum")
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise DataError(f"{folder / 'meta.json'}: missing or damaged") from None
    if checksum != _checksum(meta) or meta["format"] != FORMAT:
        raise DataError(f"{folder / 'meta.json'}: damaged, or written by another version")
    return dict(meta)


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, sha256: str, size: int | None = None) -> None:
    try:
        sound = size in (None, path.stat().st_size) and _sha256_of(path) == sha256
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not sound:
        raise DataError(f"{path}: damaged: its size or SHA-256 is not the recorded one")


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
