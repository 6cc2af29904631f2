"""Preference data: for one question an answer that was chosen and one that was rejected.

A row holds ``prompt`` (turns, or the user's words), ``chosen`` and ``rejected`` (a turn of the assistant, or
its words); or ``chosen`` and ``rejected`` are whole conversations with the same beginning (UltraFeedback).
Only the last answer is learnt. All pairs come once before any comes again, as examples do.

Shape suffixes: P pairs, B = 2 P rows, the chosen answer of a pair before its rejected one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.data.chat import PLAIN_TEMPLATE, ChatTemplate, Message
from moesaic.data.corpora import DataOptions, files_by_domain
from moesaic.data.epochs import taken
from moesaic.data.examples import Coded, padded, template_of
from moesaic.data.instructions import which_held_out
from moesaic.data.readers import read_rows
from moesaic.data.store import Split, Windows
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError

Pair = tuple[Coded, Coded]
Reference = NDArray[
    np.float32
]  # [pairs, 2]: what the reference model gives chosen and rejected answer, in nats


@dataclass
class PairDomain:
    """The pairs of one domain. ``tokens`` counts the tokens of both answers, of which ``train_tokens`` are
    for training."""

    domain: str
    train: list[Pair] = field(default_factory=list)
    val: list[Pair] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.train_tokens + _answers(self.val)

    @property
    def train_tokens(self) -> int:
        return _answers(self.train)


class PreferenceStore:
    """Pairs for the one loop (see ``Store``). ``reference`` holds the log-probabilities of the model that a
    run begins with, once they have been given."""

    def __init__(
        self, shards: list[PairDomain], tokenizer: Tokenizer, fingerprint: str, notes: list[str], seq_len: int
    ) -> None:
        self.shards, self.tokenizer, self.fingerprint, self.notes = shards, tokenizer, fingerprint, notes
        self.seq_len = seq_len
        self.train_tokens = sum(shard.train_tokens for shard in shards)
        self.pairs: dict[Split, list[Pair]] = {
            "train": [pair for shard in shards for pair in shard.train],
            "val": [pair for shard in shards for pair in shard.val],
        }
        self.reference: dict[Split, Reference] = {}

    @property
    def domains(self) -> list[str]:
        return [shard.domain for shard in self.shards]

    def batch(
        self, seed: int, step: int, batch_size: int, seq_len: int, domain: str | None = None
    ) -> Windows:
        """``batch_size`` pairs, which are twice as many rows."""
        first, size = self._places(domain)
        return self.windows("train", (first + taken(seed, step, batch_size, size)).tolist())

    def _places(self, domain: str | None) -> tuple[int, int]:
        """Where the training pairs of a domain, or all, begin among all, and how many they are."""
        if domain is None:
            return 0, len(self.pairs["train"])
        number = self.domains.index(domain)
        return sum(len(shard.train) for shard in self.shards[:number]), len(self.shards[number].train)

    def rows_per_epoch(self, seed: int, seq_len: int) -> int:
        """Pairs: a step's ``batch_size`` counts these."""
        return len(self.pairs["train"])

    def windows(self, split: Split, numbers: list[int]) -> Windows:
        """Some pairs as rows, with what the reference gives them."""
        import torch

        pairs = [self.pairs[split][number] for number in numbers]
        windows = padded([answer for pair in pairs for answer in pair], self.seq_len)
        if split not in self.reference:
            return windows
        return windows._replace(reference_B=torch.from_numpy(self.reference[split][numbers].flatten()))

    def validation(self, batch_size: int, seq_len: int, domain: str | None = None) -> Iterator[Windows]:
        """The chosen answers that are held out, in order: how likely they stay is told beside the margin.
        Raises DataError at once for an unknown domain."""
        if domain is not None and domain not in self.domains:
            raise DataError(f"no domain {domain!r}; there are: {', '.join(self.domains)}")
        chosen = [pair[0] for shard in self.shards if domain in (None, shard.domain) for pair in shard.val]
        starts = range(0, len(chosen), batch_size)
        return (padded(chosen[start : start + batch_size], self.seq_len) for start in starts)

    def bytes_per_token(self, split: Split, domain: str | None = None) -> float:
        """UTF-8 bytes per token of the chosen answers."""
        shards = [shard for shard in self.shards if domain in (None, shard.domain)]
        pairs = [pair for shard in shards for pair in (shard.train if split == "train" else shard.val)]
        answers = [ids[1:][learnt[1:]] for (ids, learnt), _ in pairs]
        tokens = sum(map(len, answers))
        if not tokens:
            raise DataError(f"the {split} part of {domain or 'these pairs'} holds no answers")
        return sum(self.tokenizer.byte_length(ids) for ids in answers) / tokens


def prepare_preferences(
    options: DataOptions, tokenizer: Tokenizer, seq_len: int, say: Callable[[str], None]
) -> PreferenceStore:
    """Read, render and tokenise every pair of ``options.path``; the last ``val_fraction`` of each domain, in
    an order made of their text, is held out.

    Pairs of two equal answers, and those of which an answer is cut away by ``seq_len``, are left out and
    counted. Raises DataError naming file and line, and where nothing is left.
    """
    if not options.path:
        raise DataError("data.path: name the files of pairs, as data.path.harmless=pairs.jsonl")
    template = template_of(options) or ChatTemplate(PLAIN_TEMPLATE)
    shards, equal, cut, digest = [], 0, 0, hashlib.sha256(f"{tokenizer.fingerprint} {seq_len}".encode())
    for label, paths in files_by_domain(options).items():
        found: list[tuple[str, Pair]] = []
        for path in paths:
            for where, row in read_rows(path, options.max_line_bytes):
                pair = _pair(row, where, tokenizer, template)
                short = tuple((ids[: seq_len + 1], learnt[: seq_len + 1]) for ids, learnt in pair)
                if not all(learnt[1:].any() for _, learnt in short):
                    cut += 1
                    continue
                if np.array_equal(short[0][0], short[1][0]):
                    equal += 1
                    continue
                found.append((_key(row), (short[0], short[1])))
        found = sorted(found, key=lambda entry: entry[0][::-1])[: options.max_documents]
        if len(found) < 2:
            raise DataError(
                f"domain {label} has {len(found)} pair(s) left in train.seq_len = {seq_len} tokens, too few "
                f"to hold one out ({equal} of equal answers, {cut} cut away)"
            )
        out = which_held_out([key for key, _ in found], options.val_fraction)
        train = [pair for (_, pair), held in zip(found, out, strict=True) if not held]
        val = [pair for (_, pair), held in zip(found, out, strict=True) if held]
        shards.append(PairDomain(label, train, val))
        digest.update("".join([label, str(options.val_fraction), *(key for key, _ in found)]).encode())
        digest.update(b"".join(ids.tobytes() for _, pair in found for ids, _ in pair))
        say(f"{label}: {len(found):,} pairs, {len(val):,} held out")
    notes = [f"{equal:,} pairs have two equal answers; left out"] if equal else []
    notes += [f"{cut:,} pairs lose an answer in {seq_len} tokens; left out"] if cut else []
    return PreferenceStore(shards, tokenizer, digest.hexdigest(), notes, seq_len)


def _pair(row: dict[str, Any], where: str, tokenizer: Tokenizer, template: ChatTemplate) -> Pair:
    sides = {name: _turns(row, name, where) for name in ("chosen", "rejected")}
    if "prompt" in row and all(len(turns) == 1 for turns in sides.values()):
        prompt = _turns(row, "prompt", where)
        conversations = [prompt + turns for turns in sides.values()]
    else:
        conversations = list(sides.values())
        if conversations[0][:-1] != conversations[1][:-1]:
            raise DataError(f"{where}: chosen and rejected answer different prompts; make them begin alike")
    for conversation in conversations:
        if conversation[-1]["role"] != "assistant" or len(conversation) < 2:
            raise DataError(f"{where}: an answer is the assistant's, after a turn of the user")
        if not conversation[-1]["content"].strip():
            raise DataError(f"{where}: an answer is empty; remove the row")
    first, second = (_coded(conversation, where, tokenizer, template) for conversation in conversations)
    return first, second


def _coded(turns: list[Message], where: str, tokenizer: Tokenizer, template: ChatTemplate) -> Coded:
    """A conversation as ids, of which the last answer is learnt."""
    try:
        text, spans = template.spans(turns)
        ids, start = tokenizer.encode_placed(text)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    begin, end = spans[-1]
    learnt = (start >= begin) & (start < end)
    if not learnt.any():
        raise DataError(f"{where}: the chat template does not write what the assistant says")
    return ids, learnt


def _turns(row: dict[str, Any], name: str, where: str) -> list[Message]:
    """A field as turns: it holds them, or the words of one."""
    value = row.get(name)
    if not _is_unicode(value):
        raise DataError(f"{where}: field {name!r} holds a lone surrogate, which is no character")
    if isinstance(value, str):
        return [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    roles = ("system", "user", "assistant")
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: field {name!r} is neither text nor a list of turns")
    for turn in value:
        if (
            not isinstance(turn, dict)
            or turn.get("role") not in roles
            or not isinstance(turn.get("content"), str)
        ):
            raise DataError(f"{where}: a turn of {name!r} needs role ({', '.join(roles)}) and content")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _is_unicode(value: Any) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False, default=str))


def _key(row: dict[str, Any]) -> str:
    """What decides whether a pair is held out: a hash of what is asked, so that all pairs of one prompt stay
    on one side."""
    asked = row.get("prompt", row["chosen"][:-1] if isinstance(row["chosen"], list) else "")
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _answers(pairs: list[Pair]) -> int:
    return sum(int(learnt[1:].sum()) for pair in pairs for _, learnt in pair)
