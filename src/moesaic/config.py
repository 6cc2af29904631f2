"""TOML to validated options and back. This file knows no field of any recipe.

An options class is a frozen pydantic model that derives from ``Options`` and lives beside what it
configures. A recipe is a TOML table; ``a.b=c`` overrides are written over it before it is checked.
"""

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from moesaic.errors import RecipeError


class Options(BaseModel):
    """Base of every options class: unknown keys, NaN and infinities are refused; frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _as_a_recipe_means_it(cls, table: Any) -> Any:
        """``none`` is no value where none is allowed (TOML has no word for it). Python counts True
        as 1; a recipe must not: as text it is refused where it stands."""
        if not isinstance(table, dict):
            return table
        return {name: _understood(cls.model_fields.get(name), value) for name, value in table.items()}


O = TypeVar("O", bound=Options)


def read_toml(path: Path) -> dict[str, Any]:
    """Read one TOML file. Raises RecipeError that names the file and, where known, the line."""
    try:
        return tomllib.loads(read_text(path))
    except ValueError as error:  # TOMLDecodeError, or a number with more digits than Python reads
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid TOML: brackets inside brackets without end") from None


def read_text(path: Path) -> str:
    """Read one TOML file as it is written. Raises RecipeError that names the file."""
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a directory; give a TOML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None


def dump_toml(options: Options) -> str:
    """The options as TOML, defaults included, so that a run directory explains itself.

    TOML has no null: a key whose value is None is left out, which reads back as its default, so
    every optional field must default to None.
    """
    return tomli_w.dumps(options.model_dump(mode="json", exclude_none=True))


def parse_value(text: str) -> Any:
    """The value of an override: TOML where it parses, else plain text."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        table = tomllib.loads(f"value = {text}")
    except ValueError:  # not TOML, or a number with more digits than Python reads
        return text
    return table["value"] if len(table) == 1 else text


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
    result: dict[str, Any] = _copy(table)
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


def _understood(field: FieldInfo | None, value: Any) -> Any:
    if field is None or not isinstance(value, bool | str):
        return value
    accepted = {field.annotation, *get_args(field.annotation)}
    if isinstance(value, bool):
        return str(value).lower() if accepted & {int, float} and bool not in accepted else value
    return None if value == "none" and type(None) in accepted else value


def _copy(value: Any) -> Any:
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def _options_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for inner in get_args(annotation):
            yield from _options_in(inner)


def _locate(cls: type[BaseModel], location: Sequence[int | str]) -> tuple[str, list[type[BaseModel]]]:
    """The dotted key of a pydantic location, without the union tags that pydantic inserts
    (router, noisy_top_k, x), and the options classes that its last step was looked up in."""
    parts: list[str] = []
    owners: list[type[BaseModel]] = [cls]
    nodes: list[type[BaseModel]] = [cls]
    for step in location:
        if isinstance(step, int):
            parts.append(f"[{step}]")
            continue
        if len(nodes) > 1:  # the step after a union is the tag of one of its members
            nodes = [n for n in nodes if n.model_fields["kind"].default == step]
            continue
        parts.append(step)
        owners = nodes
        nodes = [
            o for n in nodes if step in n.model_fields for o in _options_in(n.model_fields[step].annotation)
        ]
    return ".".join(parts).replace(".[", "["), owners


def _suggest(key: str, owners: list[type[BaseModel]], known: list[str]) -> str:
    """The key that was probably meant: the same name in another table, else one like it in this one."""
    table, _, tail = key.rpartition(".")
    siblings = [name for owner in owners for name in owner.model_fields]
    elsewhere = [k for k in known if k.rpartition(".")[2] == tail and k.rpartition(".")[0] != table]
    near = difflib.get_close_matches(tail, siblings, n=1, cutoff=0.7)
    found = elsewhere[:1] or [f"{table}.{name}" if table else name for name in near]
    return f"; did you mean {found[0]}?" if found else ""


def _sentence(cls: type[BaseModel], detail: Any, known: list[str]) -> str:
    kind, given, message = detail["type"], detail["input"], detail["msg"]
    key, owners = _locate(cls, detail["loc"])
    if kind == "extra_forbidden":
        return f"{key}: unknown key{_suggest(key, owners, known)}"
    if kind == "missing":
        return f"{key}: this key is required"
    if kind == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    if kind == "union_tag_invalid":
        return (
            f"{key}.kind: should be one of {detail['ctx']['expected_tags']}, not {_shown(given.get('kind'))}"
        )
    if kind.startswith("string_pattern"):
        return f"{key}: {_shown(given)} is not of the form {detail['ctx']['pattern']}"
    expected = next((words for start, words in _EXPECTED.items() if kind.startswith(start)), None)
    expected = expected or message.replace("Input should be ", "")
    return f"{key}: should be {expected}, not {_shown(given)}"


_EXPECTED = {
    "int_": "a whole number",
    "float_": "a number",
    "bool_": "true or false",
    "string_type": "text (write it in quotes)",
    "list_": "a list",
    "tuple_": "a list",
    "model_": "a table",
    "dict_": "a table",
}


def _shown(value: Any) -> str:
    """A value as a recipe writes it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | list | dict) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
