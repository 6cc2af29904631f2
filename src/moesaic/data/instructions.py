"""Instruction data: rows of JSON lines as conversations, and as tokens of which only the assistant's are
learnt.

A row holds ``messages`` (role and content), or ``instruction``, perhaps ``input``, and ``output``, or plain
``text``, all of which is then learnt. What it belongs to is its ``domain``, or its file's name.

Shape legend: T positions.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesaic.data.chat import PLAIN_TEMPLATE, ChatTemplate, Message
from moesaic.data.readers import format_of, read_rows, read_texts, stem_of, text_of
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import DataError

_ROLES = ("system", "user", "assistant")
_MOST_LINE = 16 * 2**20


@dataclass(frozen=True)
class Example:
    """A conversation, or a plain text (``messages`` is then empty), its domain, and where it stands."""

    messages: list[Message]
    text: str
    domain: str
    where: str


def read_examples(
    path: Path, domain: str | None = None, field: str = "text", max_line_bytes: int = _MOST_LINE
) -> Iterator[Example]:
    """Every example of a file: JSON lines, rows of Parquet, or one plain text; ``field`` holds the text of a
    row that is no conversation. With ``domain`` only those that belong to it: rows that say ``domain``
    themselves may belong to another, all else is its. Raises DataError naming file and line."""
    if format_of(path) not in (".jsonl", ".json", ".parquet"):
        for text in read_texts(path, field, max_line_bytes):
            yield Example([], text, domain or stem_of(path), str(path))
        return
    for where, row in read_rows(path, max_line_bytes):
        own = row.get("domain")
        if domain and isinstance(own, str) and own and own != domain:
            continue
        label = domain or (own if isinstance(own, str) and own else stem_of(path))
        messages = _messages(row, where)
        yield Example(messages, "" if messages else text_of(row, field, where), label, where)


def tokens_of(
    example: Example, tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Token ids [T] of an example, and which of them are to be learnt [T]: the assistant's, or all of a plain
    text. Raises DataError."""
    try:
        if not example.messages:
            ids = tokenizer.encode(example.text)
            return ids, np.ones(len(ids), dtype=bool)
        text, spans = (template or ChatTemplate(PLAIN_TEMPLATE)).spans(example.messages)
        ids, start = tokenizer.encode_placed(text)
    except DataError as error:
        raise DataError(f"{example.where}: {error}") from None
    learnt = np.zeros(len(start), dtype=bool)
    for begin, end in spans:
        learnt |= (start >= begin) & (start < end)
    return ids, learnt


def split_key(example: Example) -> str:
    """What decides whether an example is held out: a hash of its words, so that no other template, tokenizer,
    length or neighbour moves it from one side to the other."""
    words = json.dumps(example.messages, sort_keys=True) if example.messages else example.text
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()


def which_held_out(keys: Sequence[str], fraction: float) -> list[bool]:
    """Which of the examples with these keys are held out: those below ``fraction``, but one at least, and not
    all."""
    below = [int(key[:12], 16) < fraction * 16**12 for key in keys]
    if not any(below):
        below[min(range(len(keys)), key=lambda n: keys[n])] = True
    elif all(below):
        below[max(range(len(keys)), key=lambda n: keys[n])] = False
    return below


def _messages(row: dict[str, Any], where: str) -> list[Message]:
    if "messages" in row:
        given = row["messages"]
        if not isinstance(given, list) or not given:
            raise DataError(f"{where}: messages is no list of turns")
        messages = [_message(message, where) for message in given]
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{where}: has no turn of the assistant, so there is nothing to learn")
        return messages
    if "instruction" not in row and "output" not in row:
        return []
    for name in ("instruction", "output"):
        if name not in row:
            raise DataError(f"{where}: no field {name!r}; instruction and output go together")
    instruction, output = text_of(row, "instruction", where), text_of(row, "output", where)
    if not output.strip():
        raise DataError(f"{where}: output is empty, so there is nothing to learn; remove the row")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise DataError(f"{where}: field 'input' holds {type(more).__name__}, not a string")
    asked = f"{instruction}\n\n{more}" if more else instruction
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": output}]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise DataError(f"{where}: a turn's role is one of {', '.join(_ROLES)}")
    if "content" not in message:
        raise DataError(f"{where}: a turn has no content")
    return {"role": message["role"], "content": text_of(message, "content", where)}
