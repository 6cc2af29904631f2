"""Pretraining data: a corpus tokenised once into the memory-mapped shards of store.py.

``prepare`` writes one shard of token ids per domain into a folder named after all that decides its
content, so that a second run opens it instead of tokenising again. The folder appears complete or not
at all: it is built under another name and renamed. A preparation that is interrupted is gone on with
(sharding.py). Every opening checks sizes and SHA-256.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moesaic.data.cleaning import Cleaner
from moesaic.data.corpora import Corpus, DataOptions, cache_folder, open_corpus
from moesaic.data.examples import patterns_of, prepare_curriculum, prepare_examples
from moesaic.data.preferences import prepare_preferences
from moesaic.data.sharding import reasons_of, remove_leftovers, write_shards
from moesaic.data.store import FORMAT, Store, TokenStore, checksum_of, sha256_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError, ResourceError, Stopped
from moesaic.files import sync_directory, write_atomic

_ABANDONED = 7 * 86_400  # seconds after which an interrupted preparation that nobody went on with is removed


def prepare(
    options: DataOptions,
    *,
    seq_len: int = 2048,
    progress: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Store:
    """The tokens of a corpus: opened when they are in the cache intact, made otherwise; or instructions,
    which are read anew and cut to ``seq_len``.

    ``progress`` is given sentences. Of two preparations at once the second waits for the first. Raises
    DataError for a corpus, tokenizer or cache that cannot be used, ResourceError on a full disk, Stopped once
    ``stopped`` says so; after the last two the same call goes on where it was.
    """
    say = progress or (lambda sentence: None)
    if options.source == "curriculum":
        return prepare_curriculum(options, _tokenizer_of_patterns(options, say), seq_len, say)
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
    clean = options.clean.model_dump(exclude_defaults=True)
    decides = [FORMAT, corpus.fingerprint(), identity, options.val_fraction, *([clean] if clean else [])]
    folder = cache_folder(options) / "tokens" / hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    if not _is_whole(folder, say):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(folder)
            _prepare_folder(folder, corpus, given, options, say, stopped)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ResourceError(
                    f"{folder.parent}: the disk is full; make room and repeat the command, which goes on "
                    "from here, or set data.cache"
                ) from None
            reason = f"cannot be written ({error.strerror})"
            raise DataError(f"{folder.parent}: {reason}; set data.cache") from None
    return TokenStore(folder, options.weights, options.document_mask)


def _tokenizer_of_patterns(options: DataOptions, say: Callable[[str], None]) -> Tokenizer:
    """The one that is given, or one trained on the patterns' own words."""
    given, _ = _given_tokenizer(options)
    if given is not None:
        return given
    texts = (given + wanted for pattern in patterns_of(options) for given, wanted in pattern.tasks())
    if options.tokenizer == "char":
        return Tokenizer.char(texts)
    say(f"training a BPE tokenizer of {options.vocab_size:,} tokens")
    return Tokenizer.bpe(texts, options.vocab_size)


def _is_whole(folder: Path, say: Callable[[str], None]) -> bool:
    if not folder.exists():
        return False
    try:
        TokenStore(folder)
    except DataError as error:
        say(f"{error}; it is built again")
        return False
    return True


def _prepare_folder(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer | None,
    options: DataOptions,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Build a store beside ``folder``, or finish building it, and give it that name."""
    building = folder.with_name(f".building-{folder.name}")
    with _locked(building, say, stopped):
        # Who held the lock before may have finished: then there is nothing left to do, and nothing to rename.
        if _is_whole(folder, lambda sentence: None):
            with suppress(OSError):
                building.rmdir()
            return
        try:
            _build(building, corpus, tokenizer, options, say, stopped)
        except DataError:  # another corpus will have another name: nobody would go on with this
            shutil.rmtree(building, ignore_errors=True)
            raise
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        os.rename(building, folder)
        sync_directory(folder.parent)


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


def _trained_tokenizer(
    options: DataOptions, corpus: Corpus, say: Callable[[str], None], stopped: Callable[[], bool]
) -> Tokenizer:
    """A tokenizer of the text as it will be tokenised: mended, and without what is left out."""
    cleaner = Cleaner(options.clean)

    def cleaned() -> Iterator[str]:
        for document in corpus.documents():
            if stopped():
                raise Stopped("stopped while training a tokenizer; the same command begins that again")
            text = cleaner.text(document.text)
            if text:
                yield text

    texts = cleaned()
    if options.tokenizer == "char":
        return Tokenizer.char(texts)
    say(f"training a BPE tokenizer of {options.vocab_size:,} tokens")
    return Tokenizer.bpe(texts, options.vocab_size)


def _build(
    folder: Path,
    corpus: Corpus,
    given: Tokenizer | None,
    options: DataOptions,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Write every file of a token store; ``meta.json``, which makes it one, comes last."""
    trained = folder / "tokenizer.json"
    tokenizer = given or (Tokenizer.load(trained) if trained.exists() else None)
    tokenizer = tokenizer or _trained_tokenizer(options, corpus, say, stopped)
    tokenizer.save(trained)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    journal = write_shards(folder, corpus, tokenizer, options, dtype, say, stopped)
    if not journal.done:
        left_out = reasons_of(dict(sum(map(Counter, journal.empty.values()), Counter[str]())))
        why = f"data.clean leaves nothing: {left_out}" if left_out else "there is no text in it"
        raise DataError(f"{corpus.describe()}: {why}")
    notes = list(corpus.notes)
    for domain, dropped in journal.empty.items():
        why = (
            f"loses all of its documents: {reasons_of(dropped)}"
            if dropped
            else "holds no text and is left out"
        )
        notes.append(f"domain {domain} {why}")
    if corpus.left_out:
        notes.append(corpus.describe())
    remove_leftovers(folder, journal)
    meta = {
        "format": FORMAT,
        "dtype": dtype,
        "tokenizer_sha256": sha256_of(trained),
        "val_fraction": options.val_fraction,
        "notes": notes,
        "domains": journal.done,
    }
    os.chmod(folder, 0o755)  # a cache may be shared
    write_atomic(folder / "meta.json", json.dumps({**meta, "checksum": checksum_of(meta)}, indent=1))


@contextmanager
def _locked(
    folder: Path,
    say: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Hold the lock of a folder, made where it is not there; the kernel drops it with the process. Waits for
    another's, and says so; without ``say``, raises BlockingIOError instead. Raises Stopped."""
    told = False
    while True:
        if say is not None:
            folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have renamed or removed the folder: then this is the lock of nothing.
            if _is_same(descriptor, folder):
                yield
                return
        except BlockingIOError:
            if say is None:
                raise
            if not told:
                say("another process is preparing this text; waiting for it")
                told = True
            if stopped():
                raise Stopped("stopped while waiting for another preparation of this text") from None
            time.sleep(0.1)
        finally:
            os.close(descriptor)


def _is_same(descriptor: int, folder: Path) -> bool:
    try:
        there = folder.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _remove_abandoned(folder: Path) -> None:
    """Remove what interrupted preparations of other texts than ``folder``'s have left, long ago; those that
    live hold their folder's lock."""
    for path in folder.parent.glob(".building-*"):
        if path.name == f".building-{folder.name}":
            continue
        with suppress(OSError):  # one that is gone was another's to remove
            if time.time() - path.stat().st_mtime > _ABANDONED:
                with _locked(path):
                    shutil.rmtree(path, ignore_errors=True)
