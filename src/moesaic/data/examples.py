"""Instruction data in memory: conversations as tokens, padded into batches, a part of each domain held out.

Only what the assistant says is a target. Padding is marked, so that attention, the balance loss and the
routing statistics leave it out as the loss does.

Shape suffixes: B rows of a batch, T positions of a row.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.data import epochs
from moesaic.data.chat import ChatTemplate, load_template
from moesaic.data.corpora import DataOptions, files_by_domain
from moesaic.data.curriculum import Pattern, builtin_patterns, by_domain, read_patterns
from moesaic.data.epochs import taken
from moesaic.data.instructions import read_examples, split_key, tokens_of, which_held_out
from moesaic.data.store import IGNORED, Split, Windows, generator_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError

Ids = NDArray[np.int32]
Coded = tuple[Ids, NDArray[np.bool_]]  # and which of them are to be learnt
Choice = tuple[int, int, bool]  # an example, another, and whether to join halves of both


@dataclass
class Domain:
    """The examples of one domain: ids and which are targets. ``tokens`` counts targets, of which
    ``train_tokens`` are for training."""

    domain: str
    train: list[Coded] = field(default_factory=list)
    val: list[Coded] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.train_tokens + sum(int(learnt[1:].sum()) for _, learnt in self.val)

    @property
    def train_tokens(self) -> int:
        return sum(int(learnt[1:].sum()) for _, learnt in self.train)


class ExampleStore:
    """Examples for the one loop (see ``Store``). All training examples come once, in an order made of the
    seed, before any comes again (epochs.py); a domain's share of them is its share of batches."""

    def __init__(
        self,
        shards: list[Domain],
        tokenizer: Tokenizer,
        fingerprint: str,
        notes: list[str],
        join: float = 0.0,
        pack: bool = False,
    ) -> None:
        self.shards, self.tokenizer, self.join, self.pack = shards, tokenizer, join, pack
        self.fingerprint, self.notes = fingerprint, notes
        self.train_tokens = sum(shard.train_tokens for shard in shards)
        self._train = [example for shard in shards for example in shard.train]
        self._plans: dict[tuple[int, int, int], list[list[Choice]]] = {}

    @property
    def domains(self) -> list[str]:
        return [shard.domain for shard in self.shards]

    def batch(
        self, seed: int, step: int, batch_size: int, seq_len: int, domain: str | None = None
    ) -> Windows:
        """The next examples of the epoch, each from its beginning, cut to ``seq_len``; some are half of one
        and then half of another (``data.join``), if both halves have something to learn; a row is one, or is
        filled up with more (``data.pack``). Those of one ``domain`` are as they are."""
        if domain is not None:
            own = self.shards[self.domains.index(domain)].train
            return padded([own[n] for n in taken(seed, step, batch_size, len(own)).tolist()], seq_len)
        if self.pack:
            first = batch_size * (max(step, 1) - 1)
            rows = [self._packed_row(seed, first + n, seq_len) for n in range(batch_size)]
            return packed([self._filled(row, seq_len) for row in rows], seq_len)
        generator = generator_of(seed, step)
        first_B = taken(seed, step, batch_size, len(self._train))
        second_B = generator.integers(0, len(self._train), batch_size)
        joined_B = generator.random(batch_size) < self.join
        choices = zip(first_B.tolist(), second_B.tolist(), joined_B.tolist(), strict=True)
        return padded([self._example(*choice, seq_len) for choice in choices], seq_len)

    def rows_per_epoch(self, seed: int, seq_len: int) -> int:
        """Examples, or the rows that the first epoch's are packed into."""
        return len(self._plan(seed, 0, seq_len)) if self.pack else len(self._train)

    def _packed_row(self, seed: int, number: int, seq_len: int) -> list[Choice]:
        """A row of all epochs' rows laid end to end."""
        epoch = 0
        while number >= len(plan := self._plan(seed, epoch, seq_len)):
            number, epoch = number - len(plan), epoch + 1
        return plan[number]

    def _plan(self, seed: int, epoch: int, seq_len: int) -> list[list[Choice]]:
        """The rows of one epoch: examples in its order, as many to a row as it has room for. What would teach
        nothing in the room that is left begins the next row."""
        known = self._plans.get((seed, epoch, seq_len))
        if known is not None:
            return known
        size, generator = len(self._train), epochs.generator(seed, epoch)
        rows: list[list[Choice]] = [[]]
        room = seq_len
        second, joined = generator.integers(0, size, size), generator.random(size) < self.join
        for number in epochs.order(seed, epoch, size).tolist():
            choice = number, int(second[number]), bool(joined[number])
            ids, learnt = self._example(*choice, seq_len)
            if rows[-1] and not learnt[1 : room + 1].any():
                rows.append([])
                room = seq_len
            rows[-1].append(choice)
            room -= min(len(ids) - 1, room)
        self._plans[seed, epoch, seq_len] = rows
        return rows

    def _filled(self, row: list[Choice], seq_len: int) -> list[Coded]:
        """The examples of a row, the last cut to the room that is left."""
        parts: list[Coded] = []
        room = seq_len
        for choice in row:
            ids, learnt = self._example(*choice, seq_len)
            parts.append((ids[: room + 1], learnt[: room + 1]))
            room -= len(parts[-1][0]) - 1
        return parts

    def _example(self, number: int, other: int, both: bool, seq_len: int) -> Coded:
        first: Coded = self._train[number]
        second: Coded = self._train[other]
        if both and fits_in_half(first, seq_len) and fits_in_half(second, seq_len):
            first = join_examples(first, second, seq_len)
        return first

    def validation(self, batch_size: int, seq_len: int, domain: str | None = None) -> Iterator[Windows]:
        """The held-out examples in order. Raises DataError at once for an unknown domain."""
        if domain is not None and domain not in self.domains:
            raise DataError(f"no domain {domain!r}; there are: {', '.join(self.domains)}")
        held_out = [e for shard in self.shards if domain in (None, shard.domain) for e in shard.val]
        starts = range(0, len(held_out), batch_size)
        return (padded(held_out[start : start + batch_size], seq_len) for start in starts)

    def bytes_per_token(self, split: Split, domain: str | None = None) -> float:
        """UTF-8 bytes per target."""
        shards = [shard for shard in self.shards if domain in (None, shard.domain)]
        examples = [e for shard in shards for e in (shard.train if split == "train" else shard.val)]
        targets = [ids[1:][learnt[1:]] for ids, learnt in examples]
        tokens = sum(map(len, targets))
        if not tokens:
            raise DataError(f"the {split} part of {domain or 'these examples'} holds no tokens to predict")
        return sum(self.tokenizer.byte_length(ids) for ids in targets) / tokens


def prepare_examples(
    options: DataOptions, tokenizer: Tokenizer, seq_len: int, say: Callable[[str], None]
) -> ExampleStore:
    """Read, render and tokenise every example of ``options.path``, cut to ``seq_len`` tokens and the one
    after; about ``val_fraction`` of each domain is held out, chosen by the examples' words.

    Raises DataError naming file and line, and for a domain of which nothing is left.
    """
    if not options.path:
        raise DataError("data.path: name the files of instructions, as data.path.coder=coder.jsonl")
    template = template_of(options)
    domains: dict[str, list[tuple[str, Coded]]] = {}
    lost = 0
    for label, paths in files_by_domain(options).items():
        named = label if isinstance(options.path, dict) else None
        for path in paths:
            for example in read_examples(path, named, options.field, options.max_line_bytes):
                ids, learnt = tokens_of(example, tokenizer, template)
                ids, learnt = ids[: seq_len + 1], learnt[: seq_len + 1]
                if not learnt[1:].any():
                    lost += 1
                    continue
                domains.setdefault(example.domain, []).append((split_key(example), (ids, learnt)))
            if not domains.get(named or path.stem) and named:
                raise DataError(
                    f"{path}: nothing is left to learn of {named} in train.seq_len = {seq_len} tokens"
                )
    if not domains:
        raise DataError(f"data.path: no example has anything to learn in train.seq_len = {seq_len} tokens")
    shards, digest = _held_apart(domains, options, tokenizer, say)
    notes = [f"{lost:,} examples have nothing to learn in {seq_len} tokens; left out"] if lost else []
    fingerprint = hashlib.sha256(f"{digest} {options.val_fraction} {seq_len}".encode()).hexdigest()
    return ExampleStore(shards, tokenizer, fingerprint, notes, options.join, options.pack)


def prepare_curriculum(
    options: DataOptions, tokenizer: Tokenizer, seq_len: int, say: Callable[[str], None]
) -> ExampleStore:
    """The tasks of all patterns as examples, of which only what is to be produced is learnt, and the end of
    the text after it; about ``val_fraction`` of each domain's patterns are held out, with all their tasks.

    Of a task that is longer than ``seq_len`` tokens the beginning is cut off. Raises DataError.
    """
    domains: dict[str, list[tuple[str, Coded]]] = {}
    for name, patterns in by_domain(patterns_of(options)).items():
        for pattern in patterns[: options.max_documents]:
            key = hashlib.sha256(f"{pattern.title} {pattern.parts['observe']}".encode()).hexdigest()
            for given, wanted in pattern.tasks():
                domains.setdefault(name, []).append((key, _task(given, wanted, tokenizer, seq_len)))
    shards, digest = _held_apart(domains, options.model_copy(update={"max_documents": None}), tokenizer, say)
    fingerprint = hashlib.sha256(f"{digest} {options.val_fraction} {seq_len}".encode()).hexdigest()
    return ExampleStore(shards, tokenizer, fingerprint, [])


def patterns_of(options: DataOptions) -> list[Pattern]:
    """The patterns that the options name, those that come along by default. Raises DataError."""
    files = files_by_domain(options) if options.path else {"": [builtin_patterns()]}
    return [pattern for paths in files.values() for path in paths for pattern in read_patterns(path)]


def _task(given: str, wanted: str, tokenizer: Tokenizer, seq_len: int) -> Coded:
    ids, start = tokenizer.encode_placed(given + wanted)
    learnt = start >= len(given)
    if tokenizer.eos_id is not None:
        ids, learnt = np.append(ids, np.int32(tokenizer.eos_id)), np.append(learnt, True)
    return ids[-(seq_len + 1) :], learnt[-(seq_len + 1) :]


def _held_apart(
    domains: dict[str, list[tuple[str, Coded]]],
    options: DataOptions,
    tokenizer: Tokenizer,
    say: Callable[[str], None],
) -> tuple[list[Domain], str]:
    """Each domain's examples, some of them held out by their keys, and a hash of all."""
    shards, digest = [], hashlib.sha256(tokenizer.fingerprint.encode())
    for label, found in domains.items():
        # Ordered by the end of the key: its beginning says what is held out.
        found = sorted(found, key=lambda example: example[0][::-1])[: options.max_documents]
        if len(found) < 2:
            raise DataError(f"domain {label} has {len(found)} example: too few to hold one out; give more")
        out = which_held_out([key for key, _ in found], options.val_fraction)
        train = [coded for (_, coded), held in zip(found, out, strict=True) if not held]
        val = [coded for (_, coded), held in zip(found, out, strict=True) if held]
        shards.append(Domain(label, train, val))
        digest.update("".join([label, *(key for key, _ in found)]).encode())
        digest.update(b"".join(ids.tobytes() for _, (ids, _) in found))
        say(f"{label}: {len(found):,} examples, {len(val):,} held out, {shards[-1].tokens:,} targets")
    return shards, digest.hexdigest()


def join_examples(first: Coded, second: Coded, seq_len: int) -> Coded:
    """Two examples one after the other, each cut to half of ``seq_len``."""
    half = max(1, seq_len // 2)
    return (
        np.concatenate([first[0][:half], second[0][:half]]),
        np.concatenate([first[1][:half], second[1][:half]]),
    )


def fits_in_half(example: Coded, seq_len: int) -> bool:
    """Whether something is left to learn of an example that is cut to half of ``seq_len``."""
    return bool(example[1][1 : max(1, seq_len // 2)].any())


def template_of(options: DataOptions) -> ChatTemplate | None:
    """The chat template that ``data.template`` names, or the tokenizer's neighbour. Raises DataError."""
    if options.template is None:
        where = Path(options.tokenizer).expanduser()
        if where.is_dir():
            return load_template(where)
        return load_template(where.parent) if where.suffix == ".json" else None
    path = Path(options.template).expanduser()
    if path.is_dir():
        return load_template(path)
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), {"bos_token": "", "eos_token": ""}, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template={path}: cannot be read: {error}") from None


def padded(examples: list[Coded], seq_len: int) -> Windows:
    """Examples as one batch, padded on the right to the longest of them, at most ``seq_len``."""
    import torch

    longest = min(seq_len, max(len(ids) for ids, _ in examples) - 1)
    ids_BT = np.zeros((len(examples), longest), np.int64)
    target_BT = np.full((len(examples), longest), IGNORED, np.int64)
    real_BT = np.zeros((len(examples), longest), np.bool_)
    for row, (ids, learnt) in enumerate(examples):
        size = min(longest, len(ids) - 1)
        ids_BT[row, :size] = ids[:size]
        target_BT[row, :size] = np.where(learnt[1 : size + 1], ids[1 : size + 1], IGNORED)
        real_BT[row, :size] = True
    return Windows(torch.from_numpy(ids_BT), torch.from_numpy(target_BT), torch.from_numpy(real_BT))


def packed(rows: list[list[Coded]], seq_len: int) -> Windows:
    """Each row several examples one after the other, numbered from 1; what is not filled is padding, 0. An
    example's last token is no input, so that none predicts the next one's first."""
    import torch

    shape = (len(rows), seq_len)
    ids_BT, document_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    target_BT = np.full(shape, IGNORED, np.int64)
    for b, row in enumerate(rows):
        start = 0
        for number, (ids, learnt) in enumerate(row, 1):
            place = slice(start, start + len(ids) - 1)
            ids_BT[b, place], document_BT[b, place] = ids[:-1], number
            target_BT[b, place] = np.where(learnt[1:], ids[1:], IGNORED)
            start = place.stop
    document = torch.from_numpy(document_BT)
    real_BT = document > 0
    return Windows(
        torch.from_numpy(ids_BT),
        torch.from_numpy(target_BT),
        None if bool(real_BT.all()) else real_BT,
        document,
    )
