"""From documents to shards of token ids, so that what was done before an interruption is not done again.

A folder under way holds the shards written so far and ``journal.json``, which says how much of them counts:
what lies beyond was being written when the process ended, and is cut off. The journal is replaced every few
seconds, after the bytes that it speaks of are on the disk.
"""

import json
import os
import re
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from moesaic.data.cleaning import Cleaner
from moesaic.data.corpora import Corpus, DataOptions, Document
from moesaic.data.store import Shard, sha256_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError, Stopped
from moesaic.files import write_atomic

JOURNAL = "journal.json"
COMMIT_SECONDS = 5.0
SAY_SECONDS = 10.0
_BATCH_CHARS = 1 << 20

Say = Callable[[str], None]


@dataclass
class Journal:
    """How far a preparation is: domains that are done, and of the one under way how many documents were read
    and how many documents and tokens are in its files. ``dropped`` counts what was left out of it, by
    reason."""

    done: list[dict[str, Any]] = field(default_factory=list)
    empty: dict[str, dict[str, int]] = field(
        default_factory=dict
    )  # domains without text; why it was left out
    left_out: list[str] = field(default_factory=list)  # files that could not be read
    domain: str | None = None
    read: int = 0
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> "Journal":
        """The one in a folder; a new one where there is none, or none that can be read."""
        try:
            return cls(**json.loads((folder / JOURNAL).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, folder: Path) -> None:
        write_atomic(folder / JOURNAL, json.dumps(asdict(self)))


def write_shards(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    options: DataOptions,
    dtype: str,
    say: Say,
    stopped: Callable[[], bool],
) -> Journal:
    """Write a shard for every domain, or what is missing of them; the finished journal.

    Raises DataError for text that cannot be tokenised, Stopped once ``stopped`` says so, OSError.
    """
    journal, cleaner = Journal.of(folder), Cleaner(options.clean)
    corpus.left_out.update(journal.left_out)
    if journal.done or journal.read:
        say(f"going on with a preparation that was interrupted: {len(journal.done)} domain(s) are done")
    done = {*(shard["domain"] for shard in journal.done), *journal.empty}
    for domain in corpus.domains():
        documents = corpus.documents(domain)
        if domain in done:
            if cleaner.remembers:  # later domains are compared with it
                for document in documents:
                    cleaner.text(document.text)
            continue
        if journal.domain != domain:
            journal.domain, journal.read, journal.documents, journal.tokens = domain, 0, 0, 0
            journal.dropped = {}
        taken = {shard["file"].lower() for shard in journal.done}
        path = folder / _file_name(domain, taken)
        cleaner.dropped = Counter(journal.dropped)
        writer = _Writer(path, tokenizer, dtype, journal, cleaner, corpus, say, stopped)
        writer.write(documents)
        if journal.tokens:
            shard = writer.finished(options.val_fraction)
            journal.done.append(asdict(shard))
            say(f"{domain}: {shard.tokens:,} tokens from {shard.documents:,} documents{_left_out(shard)}")
        else:
            journal.empty[domain] = journal.dropped
        journal.domain, journal.read = None, 0
        journal.write(folder)
    return journal


def remove_leftovers(folder: Path, journal: Journal) -> None:
    """Remove what a finished store does not need. Raises OSError."""
    needed = {name for shard in journal.done for name in (shard["file"], shard["ends"])}
    for path in folder.iterdir():
        if path.name not in {*needed, "tokenizer.json"}:
            path.unlink()


def ends_of(path: Path) -> Path:
    """Beside a shard: where each of its documents ends, int64, in tokens from the shard's beginning."""
    return path.with_suffix(".ends")


def _sizes_of(path: Path) -> Path:
    """Beside a shard under way: the UTF-8 bytes of each document, int64."""
    return path.with_suffix(".sizes")


def _left_out(shard: Shard) -> str:
    return f"; left out: {reasons_of(shard.dropped)}" if shard.dropped else ""


def reasons_of(dropped: dict[str, int]) -> str:
    """How many documents were left out for what reason, in words."""
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())


@dataclass
class _Writer:
    """One domain's files, from where the journal is."""

    path: Path
    tokenizer: Tokenizer
    dtype: str
    journal: Journal
    cleaner: Cleaner
    corpus: Corpus
    say: Say
    stopped: Callable[[], bool]

    def write(self, documents: Iterator[Document]) -> None:
        journal = self.journal
        self._replay(documents)
        started = committed = said = time.monotonic()
        before = journal.tokens
        with (
            _opened(self.path, journal.tokens * np.dtype(self.dtype).itemsize) as ids,
            _opened(ends_of(self.path), journal.documents * 8) as ends,
            _opened(_sizes_of(self.path), journal.documents * 8) as sizes,
        ):
            for texts, read in self._batches(documents):
                self._append(texts, ids, ends, sizes)
                journal.read += read
                now = time.monotonic()
                if self.stopped():
                    self._commit(ids, ends, sizes)
                    raise Stopped("stopped while preparing text; the same command goes on from here")
                if now - committed >= COMMIT_SECONDS:
                    self._commit(ids, ends, sizes)
                    committed = now
                if now - said >= SAY_SECONDS:
                    pace = (journal.tokens - before) / (now - started)
                    self.say(
                        f"{journal.domain}: {journal.tokens:,} tokens from {journal.documents:,} documents "
                        f"so far, {pace:,.0f} tokens/s"
                    )
                    said = now
            self._commit(ids, ends, sizes)

    def _replay(self, documents: Iterator[Document]) -> None:
        """Pass over what has been read, without counting it again."""
        dropped = self.cleaner.dropped
        self.cleaner.dropped = Counter()
        for document in islice(documents, self.journal.read):
            if self.stopped():
                raise Stopped("stopped while preparing text; the same command goes on from here")
            if self.cleaner.remembers:
                self.cleaner.text(document.text)
        self.cleaner.dropped = dropped

    def _batches(self, documents: Iterable[Document]) -> Iterator[tuple[list[str], int]]:
        """Texts by the million characters, enough for the library's threads and little for the memory; and
        how many documents were read for them."""
        texts: list[str] = []
        size = read = 0
        for document in documents:
            read += 1
            size += len(document.text)
            text = self.cleaner.text(document.text)
            if text:
                texts.append(text)
            if size >= _BATCH_CHARS:
                yield texts, read
                texts, size, read = [], 0, 0
        if read:
            yield texts, read

    def _append(self, texts: list[str], ids: IO[bytes], ends: IO[bytes], sizes: IO[bytes]) -> None:
        journal, end_id = self.journal, self.tokenizer.eos_id
        try:
            encoded = self.tokenizer.encode_batch(texts)
        except DataError as error:
            where = f"documents {journal.documents + 1} to {journal.documents + len(texts)}"
            raise DataError(f"domain {journal.domain}, {where}: {error}") from None
        kept = [(text, row) for text, row in zip(texts, encoded, strict=True) if self.cleaner.keeps(row)]
        rows = [row if end_id is None else np.append(row, end_id) for _, row in kept]
        if rows:
            ids.write(np.concatenate(rows).astype(self.dtype).tobytes())
            lengths = np.array([len(row) for row in rows], np.int64)
            ends.write((journal.tokens + lengths.cumsum()).tobytes())
            sizes.write(np.array([len(text.encode("utf-8")) for text, _ in kept], np.int64).tobytes())
            journal.tokens += int(lengths.sum())
            journal.documents += len(rows)

    def _commit(self, *files: IO[bytes]) -> None:
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        self.journal.dropped = dict(self.cleaner.dropped)
        self.journal.left_out = sorted(self.corpus.left_out)
        self.journal.write(self.path.parent)

    def finished(self, val_fraction: float) -> Shard:
        """The whole shard's description."""
        journal, path = self.journal, self.path
        ends = np.fromfile(ends_of(path), np.int64)
        sizes = np.fromfile(_sizes_of(path), np.int64)
        train = int(journal.tokens * (1 - val_fraction))
        whole = bisect_right(ends, train)  # documents that lie in the training part from end to end
        start = int(ends[whole - 1]) if whole else 0
        part = np.fromfile(
            path, self.dtype, count=train - start, offset=start * np.dtype(self.dtype).itemsize
        )
        total = int(sizes.sum())
        train_bytes = min(int(sizes[:whole].sum()) + self.tokenizer.byte_length(part), total)
        return Shard(
            domain=str(journal.domain),
            file=path.name,
            sha256=sha256_of(path),
            documents=len(ends),
            tokens=journal.tokens,
            train_tokens=train,
            train_bytes=train_bytes,
            val_bytes=total - train_bytes,
            ends=ends_of(path).name,
            ends_sha256=sha256_of(ends_of(path)),
            dropped=journal.dropped,
        )


def _opened(path: Path, size: int) -> IO[bytes]:
    """A file to append to, of ``size`` bytes that count. Raises DataError for one that is
    shorter."""
    file = path.open("ab")
    if file.tell() < size:
        file.close()
        raise DataError(f"{path}: is shorter than its journal says; the same command now begins anew")
    file.truncate(size)
    return file


def _file_name(domain: str, taken: set[str]) -> str:
    """A name that every file system accepts; ``taken`` holds those in use, in lower case."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", domain).lstrip(".")[:80] or "domain"
    names = (f"{safe}{suffix}.bin" for suffix in ["", *(f"-{n}" for n in range(2, len(taken) + 3))])
    return next(name for name in names if name.lower() not in taken)
