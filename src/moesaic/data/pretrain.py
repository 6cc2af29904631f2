"""Pretraining data: a corpus tokenised once into the memory-mapped shards of store.py.

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
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from moesaic.data.corpora import Corpus, DataOptions, Document, cache_folder, open_corpus
from moesaic.data.examples import prepare_examples
from moesaic.data.preferences import prepare_preferences
from moesaic.data.store import FORMAT, Shard, Store, TokenStore, checksum_of, sha256_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError, ResourceError
from moesaic.files import sync_directory

_BATCH_CHARS = 1 << 20


def prepare(
    options: DataOptions, *, seq_len: int = 2048, progress: Callable[[str], None] | None = None
) -> Store:
    """The tokens of a corpus: opened when they are in the cache intact, made otherwise; or instructions,
    which are read anew and cut to ``seq_len``.

    ``progress`` is given sentences. Two preparations at once do the work twice and agree on one result.
    Raises DataError for a corpus, tokenizer or cache that cannot be used, ResourceError on a full disk.
    """
    say = progress or (lambda sentence: None)
    if options.source in ("instructions", "preferences"):
        tokenizer, _ = _given_tokenizer(options)
        if tokenizer is None:
            raise DataError(
                f"data.source={options.source} needs a tokenizer: data.tokenizer=FILE, or start=MODEL"
            )
        if options.source == "preferences":
            return prepare_preferences(options, tokenizer, seq_len, say)
        return prepare_examples(options, tokenizer, seq_len, say)
    corpus = open_corpus(options)
    given, identity = _given_tokenizer(options)
    decides = [FORMAT, corpus.fingerprint(), identity, options.val_fraction]
    folder = cache_folder(options) / "tokens" / hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    if folder.exists():
        try:
            TokenStore(folder)
        except DataError as error:
            say(f"{error}; it is built again")
        else:
            return TokenStore(folder, options.weights)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        with _locked(building):
            try:
                _build(building, corpus, given or _trained_tokenizer(options, corpus, say), options, say)
                _put_in_place(building, folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{folder.parent}: the disk is full; make room or set data.cache") from None
        raise DataError(f"{folder.parent}: cannot be written ({error.strerror}); set data.cache") from None
    return TokenStore(folder, options.weights)


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
    notes = list(corpus.notes)
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
        "tokenizer_sha256": sha256_of(folder / "tokenizer.json"),
        "val_fraction": options.val_fraction,
        "notes": notes,
        "domains": [asdict(shard) for shard in shards],
    }
    with (folder / "meta.json").open("w", encoding="utf-8", newline="\n") as out:
        json.dump({**meta, "checksum": checksum_of(meta)}, out, indent=1)
        _sync(out)
    os.chmod(folder, 0o755)  # a temporary folder is private, a cache may be shared
    sync_directory(folder)


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
    with _locked(folder.parent) as parent:
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


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[int]:
    """Hold the lock of a folder, which the kernel drops with the process; yields its descriptor.

    Raises BlockingIOError where another holds it and ``wait`` is False.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


def _remove_abandoned(cache: Path) -> None:
    """Remove what preparations that were killed have left; those that live hold their folder's lock."""
    for path in [*cache.glob(".building-*"), *cache.glob(".damaged-*")]:
        # One that has just been made may not be locked yet; one that is gone was another's to remove.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > 60:
                with _locked(path, wait=False):
                    shutil.rmtree(path, ignore_errors=True)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
