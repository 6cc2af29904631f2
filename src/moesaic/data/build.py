"""Instruction data made of public datasets: ``moesaic data build``.

A data recipe names datasets and says how their columns become instruction, input and output. Rows are drawn
at random, mixed, shuffled as a whole, and written as one JSONL that every stage of a merge reads. A dataset
that cannot be read any more is named, and the rest goes on: several of those that SmolMoE used have moved or
are scripts, which ``datasets`` 4 does not run.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from moesaic.config import Options, apply_overrides, parse_overrides, read_toml, validate
from moesaic.data.corpora import matches
from moesaic.data.readers import format_of, hub_rows, read_rows
from moesaic.errors import DataError, RecipeError
from moesaic.files import explained, write_atomic

_MOST_LINE = 64 * 2**20
_LOOK = 20  # rows looked at for one that is taken, where a source does not say
_ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # no rows
_ROLES = {
    **{role: role for role in ("system", "user", "assistant")},
    "human": "user",
    "gpt": "assistant",
}
_SPLITS = ("train", "validation", "test")
_PLACE = re.compile(r"\{(\w+(?:\.\w+)*)(?:\|(\w+))?\}")

Row = dict[str, Any]


class SourceOptions(Options):
    """One dataset and what becomes of its columns.

    ``instruction``, ``input`` and ``output`` are texts with places such as ``{question}``, ``{table.header}``
    or ``{text|paragraph}`` (its first paragraph; ``|sentence`` its first sentence). Or ``messages`` names a
    column of turns with role and content (or from and value), or ``turns`` one of utterances, user and
    assistant in turn."""

    domain: str = Field(min_length=1)
    dataset: str | None = None  # on the Hub, as owner/name
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    path: str | None = None  # a local file, or a glob, of the same columns: JSON lines or Parquet
    rows: int = Field(1000, ge=1)  # to take
    look: int | None = Field(None, ge=1)  # to choose from; 20 × rows when not given
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    messages: str | None = None
    turns: str | None = None
    longest: int = Field(8000, ge=1)  # characters of a row; longer ones are passed over

    @model_validator(mode="after")
    def _says_what_becomes_of_it(self) -> Self:
        ways = [self.output is not None, self.messages is not None, self.turns is not None]
        if sum(ways) != 1:
            raise ValueError("give one of: instruction and output, messages, turns")
        if (self.output is None) != (self.instruction is None) or (self.input and self.output is None):
            raise ValueError("instruction, input and output go together, and not with messages or turns")
        if (self.dataset is None) == (self.path is None):
            raise ValueError("give dataset, a name on the Hub, or path, local files: one of them")
        if self.path is not None and (self.config, self.split, self.revision) != (None, "train", None):
            raise ValueError("config, split and revision are for a dataset; path names its files itself")
        return self

    @property
    def name(self) -> str:
        """What people call it."""
        return self.dataset or str(self.path)


class BuildOptions(Options):
    """A data recipe. ``local`` is a folder in which a copy of ``owner/name`` may lie under that name; what is
    there is not fetched."""

    about: str = ""
    seed: int = Field(1337, ge=0)
    local: str | None = None
    source: list[SourceOptions] = Field(min_length=1)


@dataclass
class Taken:
    """What came of one source; ``problem`` says why it could not be read to its end, if it could not."""

    source: SourceOptions
    rows: list[Row] = field(default_factory=list)
    looked: int = 0
    passed_over: int = 0
    problem: str | None = None


def builtin_mixes() -> dict[str, Path]:
    """The data recipes that come along, by name: ``roles`` of SmolMoE's experts, ``olmoe-sft``."""
    folder = resources.files("moesaic") / "data" / "mixes"
    files = sorted(Path(str(file)) for file in folder.iterdir() if file.name.endswith(".toml"))
    return {file.stem: file for file in files}


def build_recipe(name: str, overrides: list[str]) -> BuildOptions:
    """A data recipe by file or built-in name. Raises RecipeError."""
    path = builtin_mixes().get(name, Path(name))
    return validate(BuildOptions, apply_overrides(read_toml(path), parse_overrides(overrides)), str(path))


def build(options: BuildOptions, out: Path, say: Callable[[str], None]) -> list[Taken]:
    """Write the rows of all sources to ``out``, shuffled; what came of each source.

    A row is written once however often it comes. Raises RecipeError where ``out`` exists, DataError where no
    source gives a row.
    """
    if os.path.lexists(out):
        raise RecipeError(f"{out}: exists; choose another name")
    with explained(out.parent, f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    taken = []
    for number, source in enumerate(options.source):
        say(f"{source.domain}: reading {source.name}")
        draw = random.Random(f"{options.seed} {number} {source.name}")
        taken.append(_take(source, options.local, draw, seen))
        if problem := taken[-1].problem:
            kept = f"{len(taken[-1].rows):,} rows of it are kept" if taken[-1].rows else "it is left out"
            say(f"{source.domain}: {source.name}: {kept}: {problem}")
    rows = [row for one in taken for row in one.rows]
    if not rows:
        raise DataError(f"{out}: not written: no source gave a row")
    random.Random(options.seed).shuffle(rows)
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return taken


def _take(source: SourceOptions, local: str | None, draw: random.Random, seen: set[bytes]) -> Taken:
    """At most ``source.rows`` of the rows looked at, each as likely as any other (Vitter's algorithm R)."""
    taken, good = Taken(source), 0
    try:
        for where, values in islice(_rows(source, local), source.look or _LOOK * source.rows):
            taken.looked += 1
            row = _row(source, values, where)
            text = json.dumps(row, sort_keys=True, ensure_ascii=False)
            key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
            if row is None or key in seen or len(text) > source.longest or not _is_text(text):
                taken.passed_over += 1
                continue
            seen.add(key)
            good += 1
            if len(taken.rows) < source.rows:
                taken.rows.append(row)
            elif (place := draw.randrange(good)) < source.rows:
                taken.rows[place] = row
    except DataError as error:
        taken.problem = str(error).splitlines()[0]
    return taken


def _rows(source: SourceOptions, local: str | None) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if source.path is not None:
        return _rows_of_files(matches(source.path))
    try:
        copy = None if local is None else Path(local).expanduser() / str(source.dataset)
    except RuntimeError:
        raise DataError(f"local = {local}: there is no such user's home") from None
    if copy is not None and copy.is_dir():
        return _rows_of_files(_files_of_copy(copy, source))
    return hub_rows(str(source.dataset), source.config, source.split, source.revision)


def _files_of_copy(copy: Path, source: SourceOptions) -> list[Path]:
    """The files of a dataset's copy; where their paths tell configurations or splits apart, those asked for.
    Raises DataError."""
    found = [f for f in sorted(copy.rglob("*")) if format_of(f) in (".jsonl", ".parquet", ".json")]
    found = [f for f in found if f.name not in _ABOUT]
    if source.config and any(source.config in str(f.relative_to(copy)) for f in found):
        found = [f for f in found if source.config in str(f.relative_to(copy))]
    if any(split in str(f.relative_to(copy)) for f in found for split in _SPLITS):
        found = [f for f in found if source.split in str(f.relative_to(copy))]
    if not found:
        raise DataError(f"{copy}: holds no JSON lines and no Parquet of split {source.split!r}")
    return found


def _rows_of_files(files: list[Path]) -> Iterator[tuple[str, Row]]:
    for file in files:
        yield from read_rows(file, _MOST_LINE)


def _row(source: SourceOptions, values: Mapping[str, Any], where: str) -> Row | None:
    """One row in our format, None where nothing would be learnt from it. Raises DataError for a column that
    is not there."""
    if source.output is None:
        column = source.messages or str(source.turns)
        turns = _value(values, column, where)
        if not isinstance(turns, list):
            raise DataError(f"{where}: column {column!r} holds {type(turns).__name__}, not a list of turns")
        messages = _messages(turns) if source.messages else _alternating(turns)
        return {"domain": source.domain, "messages": messages} if messages else None
    row = {"domain": source.domain, "instruction": _filled(str(source.instruction), values, where)}
    if source.input is not None and (more := _filled(source.input, values, where)):
        row["input"] = more
    row["output"] = _filled(source.output, values, where)
    return row if row["instruction"] and row["output"] else None


def _messages(turns: list[Any]) -> list[dict[str, str]]:
    """Turns of role and content, or of from and value as ShareGPT has them, if each is one; else none."""
    kept = []
    for turn in turns:
        if isinstance(turn, dict):
            role = _ROLES.get(str(turn.get("role", turn.get("from"))).lower())
            content = turn.get("content", turn.get("value"))
            if role and isinstance(content, str):
                kept.append({"role": role, "content": content})
    return kept if kept and len(kept) == len(turns) and kept[-1]["role"] == "assistant" else []


def _alternating(turns: list[Any]) -> list[dict[str, str]]:
    """Utterances as user and assistant in turn, up to the last of the assistant's."""
    texts = [" ".join(str(text).split()) for text in turns]
    texts = texts[: len(texts) // 2 * 2]
    return [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts) if all(texts)
    ]


def _filled(template: str, values: Mapping[str, Any], where: str) -> str:
    def place(match: re.Match[str]) -> str:
        text = _text(_value(values, match[1], where), match[1], where)
        if match[2] is None:
            return text
        if match[2] not in _PARTS:
            raise DataError(f"{where}: {match[0]}: {', '.join(_PARTS)} are the parts of a text")
        return _PARTS[match[2]](text)

    return _PLACE.sub(place, template).strip()


def _value(values: Any, path: str, where: str) -> Any:
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            columns = ", ".join(map(str, values)) if isinstance(values, Mapping) else "none"
            columns = columns if columns.isprintable() else ascii(columns)  # it comes from a stranger
            raise DataError(f"{where}: has no column {path!r}; it has {columns}")
        values = values[name]
    return values


def _text(value: Any, path: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{where}: column {path!r} holds {type(value).__name__}, which is no text")


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: a lone surrogate is no character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


_PARTS: dict[str, Callable[[str], str]] = {
    "paragraph": lambda text: text.strip().split("\n\n", 1)[0].strip(),
    "sentence": lambda text: re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0],
}
