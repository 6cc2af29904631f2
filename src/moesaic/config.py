"""TOML to validated options and back. This file knows no field of any recipe.

An options class is a frozen pydantic model that derives from ``Options`` and lives beside what it
configures. A recipe is a TOML table; ``a.b=c`` overrides are written over it before it is checked.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from moesaic.errors import RecipeError


class Options(BaseModel):
    """Base of every options class: unknown keys, NaN and infinities are refused; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)


O = TypeVar("O", bound=Options)


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file. Raises RecipeError that names the file and, where known, the line."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; give a TOML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def dump_toml(options: Options) -> str:
    """The options as TOML, defaults included, so that a run directory explains itself.

    TOML has no null: a key whose value is None is left out, which reads back as its default, so
    every optional field must default to None.
    """
    return tomli_w.dumps(options.model_dump(mode="json", exclude_none=True))


def parse_value(text: str) -> Any:
    """The value of an override: TOML where it parses, ``none`` for no value, else plain text."""
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """``a.b=c``, ``--a.b=c`` and ``--a.b c`` to (dotted key, text) pairs, in order."""
    pairs: list[tuple[str, str]] = []
    rest = iter(words)
    for word in rest:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise RecipeError(f"{word!r}: an override is written key=value or --key value")
            following = next(rest, None)
            if following is None:
                raise RecipeError(f"{word}: a value is missing after it")
            text = following
        if not key or not all(key.split(".")):
            raise RecipeError(f"{word!r}: the key before the equals sign is empty")
        pairs.append((key, text))
    return pairs


def apply_overrides(table: dict[str, Any], pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A copy of ``table`` with every (dotted key, text) written over it; the last one wins."""
    result = _copy(table)
    for key, text in pairs:
        *parents, last = key.split(".")
        node = result
        for name in parents:
            child = node.setdefault(name, {})
            if not isinstance(child, dict):
                raise RecipeError(f"{key}: {name!r} is a value, not a table, so it has no key inside it")
            node = child
        node[last] = parse_value(text)
    return result


def validate(cls: type[O], table: dict[str, Any], where: str) -> O:
    """Check ``table`` against ``cls``; raises RecipeError with one line per mistake.

    ``where`` names the source for the user (a file or a recipe name).
    """
    try:
        return cls.model_validate(table)
    except ValidationError as error:
        known = list(known_keys(cls))
        lines = [_sentence(cls, detail, known) for detail in error.errors()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def known_keys(cls: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that ``cls`` accepts, tables of every alternative included."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        for nested in _options_in(field.annotation):
            yield from known_keys(nested, f"{prefix}{name}.")


def flatten(options: Options, prefix: str = "") -> dict[str, Any]:
    """Dotted key to plain value, as trackers and comparisons want them."""
    flat: dict[str, Any] = {}
    for name, value in options.model_dump(mode="json").items():
        _flatten_into(flat, prefix + name, value)
    return flat


def _flatten_into(flat: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten_into(flat, f"{key}.{name}", inner)
    else:
        flat[key] = value


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _options_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for inner in get_args(annotation):
            yield from _options_in(inner)


def _dotted(cls: type[BaseModel], location: Sequence[int | str]) -> str:
    """A pydantic location without the union tags that pydantic inserts (router, noisy_top_k, x)."""
    parts: list[str] = []
    nodes: list[type[BaseModel]] = [cls]
    for index, step in enumerate(location):
        fields = [n.model_fields[str(step)] for n in nodes if str(step) in n.model_fields]
        last = index == len(location) - 1
        if not fields and nodes and not last and not isinstance(step, int):
            continue  # a union tag
        parts.append(f"[{step}]" if isinstance(step, int) else str(step))
        nodes = [o for f in fields for o in _options_in(f.annotation)] if fields else []
    return ".".join(parts).replace(".[", "[")


def _sentence(cls: type[BaseModel], detail: Any, known: list[str]) -> str:
    location: tuple[int | str, ...] = detail["loc"]
    kind, given = detail["type"], detail["input"]
    key = _dotted(cls, location)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        tail = key.rpartition(".")[2]
        near = near or [k for k in known if k.rpartition(".")[2] == tail][:1]
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "missing":
        return f"{key}: this key is required"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    if kind in ("union_tag_invalid", "literal_error"):
        message = message.replace("Input should be", "should be")
        wrong = given.get("kind", given) if isinstance(given, dict) else given
        return f"{key}{'.kind' if kind == 'union_tag_invalid' else ''}: {_plain(message)}, not {wrong!r}"
    shown = given if not isinstance(given, float) or math.isfinite(given) else str(given)
    return f"{key}: {_plain(message)}, not {shown!r}"


def _plain(message: str) -> str:
    """Pydantic's message without the parts that speak of Python."""
    message = message.replace("Input should be", "should be").split(" found using")[0]
    if "does not match any of the expected tags" in message:
        return "should be one of " + message.split("expected tags: ")[1]
    return message[0].lower() + message[1:]
