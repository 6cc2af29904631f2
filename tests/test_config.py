"""Recipes and overrides: what is read, what is refused, and in which words."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from moesaic.config import (
    Options,
    apply_overrides,
    dump_toml,
    flatten,
    known_keys,
    parse_overrides,
    parse_value,
    read_toml,
    validate,
)
from moesaic.errors import RecipeError
from moesaic.model.attention import RopeScaling
from moesaic.model.config import ModelConfig
from moesaic.model.routers import ROUTERS


class Schedule(Options):
    steps: int = Field(100, ge=1)
    rate: float = 1e-3
    warmup: float | None = None


class Recipe(Options):
    name: str = "run"
    resume: bool = False
    sizes: list[int] = Field([1, 2])
    train: Schedule = Schedule()
    model: ModelConfig = ModelConfig()


JARGON = re.compile(
    r"pydantic|dictionary|\bdict\b|instance|NoneType|\bNone\b|object|input tag|parse|interpret|expected tags"
    r"|discriminator|datetime|ModelConfig|Options|TopK|Traceback|ValueError|union|\bFalse\b|\bTrue\b",
)


def read(*words: str, table: dict[str, Any] | None = None) -> Recipe:
    return validate(Recipe, apply_overrides(table or {}, parse_overrides(words)), "r.toml")


def refusal(*words: str, table: dict[str, Any] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        read(*words, table=table)
    return str(caught.value)


# ---- overrides --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("10_000", 10_000),
        ("1e-3", 1e-3),
        ("-0.5", -0.5),
        ("true", True),
        ("False", False),
        ("none", "none"),  # what it means depends on the key: validation decides
        ("plain", "plain"),
        ("two words", "two words"),
        ("a/b.txt", "a/b.txt"),
        ('"none"', "none"),
        ("'3'", "3"),
        ('"a\\tb"', "a\tb"),
        ("[1, 2]", [1, 2]),
        ("['a', 'b']", ["a", "b"]),
        ("{kind = 'smart'}", {"kind": "smart"}),
        ("", ""),
        ("a=b", "a=b"),
    ],
)
def test_value_of_an_override(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_override_holds_one_value_however_many_lines_it_has() -> None:
    assert parse_value('1\nname = "other"') == '1\nname = "other"'


def test_a_number_too_long_to_read_is_not_a_crash() -> None:
    assert "train.steps" in refusal(f"train.steps={'9' * 5000}")


def test_overrides_are_written_in_three_ways_and_keep_their_order() -> None:
    words = ["a.b=1", "--a.c=2", "--a.d", "3", "x=y=z", "--e", "-1"]
    assert parse_overrides(words) == [("a.b", "1"), ("a.c", "2"), ("a.d", "3"), ("x", "y=z"), ("e", "-1")]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["steps"], "key=value"),
        (["--train.steps"], "missing"),
        (["=3"], "empty"),
        (["--=3"], "empty"),
        (["a..b=3"], "empty"),
        ([".a=3"], "empty"),
    ],
)
def test_a_malformed_override_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        parse_overrides(words)
    assert words[0] in str(caught.value)


def test_overrides_win_over_the_file_and_the_last_over_the_others() -> None:
    table = {"train": {"steps": 5, "rate": 0.5}, "name": "file"}
    made = read("train.steps=6", "--train.steps", "7", "sizes=[4]", "resume=true", table=table)
    assert (made.train.steps, made.train.rate, made.name) == (7, 0.5, "file")
    assert (made.sizes, made.resume) == ([4], True)
    assert table == {"train": {"steps": 5, "rate": 0.5}, "name": "file"}  # the table itself is untouched


def test_none_takes_an_optional_value_back() -> None:
    assert read("train.warmup=none", table={"train": {"warmup": 0.1}}).train.warmup is None


def test_a_key_below_a_value_is_refused() -> None:
    message = refusal("train.steps.more=3", table={"train": {"steps": 5}})
    assert "train.steps.more" in message
    assert "'steps' is a value" in message


# ---- refusals ---------------------------------------------------------------------------------

REFUSALS: list[tuple[list[str], str]] = [
    (["train.stpes=3"], "train.stpes: unknown key; did you mean train.steps?"),
    (["model.widht=3"], "model.widht: unknown key; did you mean model.width?"),
    (["nmae=x"], "nmae: unknown key; did you mean name?"),
    (["zzzzqq=1"], "zzzzqq: unknown key"),
    (["model.router.renormalise=true"], "model.router.renormalise: unknown key; did you mean "),
    (["model.router.kind=smart", "model.router.masss=0.5"], "model.router.masss: unknown key; did you mean "),
    (["model.attention.rope_scaling.factr=2.0"], "model.attention.rope_scaling.factr: unknown key; did "),
    (["model.router.top_k=9"], "router.top_k = 9 is above experts.count = 8"),
    (["model.router.top_k=0"], "model.router.top_k: should be greater than or equal to 1, not 0"),
    (["model.router.top_k=x"], "model.router.top_k: should be "),
    (["model.width=130"], "width = 130 does not divide into attention.heads = 8"),
    (["model.router.kind=nosuch"], "model.router.kind: should be one of 'top_k', 'noisy_top_k', "),
    (["model.router.kind=3"], "model.router.kind: should be one of 'top_k', 'noisy_top_k', "),
    (
        ["model.experts.kind=tanh"],
        "model.experts.kind: should be 'swiglu', 'relu', 'gelu' or 'relu2', not 'tanh'",
    ),
    (["model.router.score=tanh"], "model.router.score: should be 'softmax' or 'sigmoid', not 'tanh'"),
    (
        ["model.router.softmax_after=true", "model.router.score=sigmoid"],
        "model.router: softmax_after = true needs",
    ),
    (["model.router.kind=smart", "model.router.min_k=5"], "model.router: min_k = 5 is above top_k = 4"),
    (["model.pattern=MX"], "model.pattern"),
    (["model=3"], "model: should be "),
    (["model.router=3"], "model.router: should be "),
    (["model.router=[]"], "model.router: should be "),
    (["model.layers=1.5"], "model.layers: should be "),
    (["model.tied=maybe"], "model.tied: should be "),
    (["train.steps=none"], "train.steps: should be "),
    (["train.steps=2024-01-01"], "train.steps: should be "),
    (["train.steps=true"], "train.steps: should be "),
    (["sizes=[1, 'a']"], "sizes[1]: should be "),
    (["sizes=3"], "sizes: should be "),
    (["train.steps=-1"], "train.steps: should be greater than or equal to 1, not -1"),
    (["train.rate=nan"], "train.rate: should be a finite number, not "),
    (["train.rate=-inf"], "train.rate: should be a finite number, not "),
    (["model.router.capacity_factor=inf"], "model.router.capacity_factor: should be a finite number, not "),
]


@pytest.mark.parametrize(
    ("words", "says"), REFUSALS, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_a_refusal_is_one_line_that_names_the_key(words: list[str], says: str) -> None:
    message = refusal(*words)
    assert message.startswith("r.toml: ")
    assert says in message
    assert "\n" not in message


@pytest.mark.parametrize("words", [words for words, _ in REFUSALS], ids=" ".join)
def test_a_refusal_speaks_no_python(words: list[str]) -> None:
    assert JARGON.findall(refusal(*words)) == []


@pytest.mark.parametrize("kind", ROUTERS)
def test_an_unknown_router_key_is_named_in_full_and_answered_with_one_of_that_router(kind: str) -> None:
    message = refusal(f"model.router.kind={kind}", "model.router.top_kk=2")
    assert message == "r.toml: model.router.top_kk: unknown key; did you mean model.router.top_k?"


def test_a_key_of_another_router_is_not_suggested_to_itself() -> None:
    message = refusal("model.router.kind=loss_free", "model.router.softmax_after=true")
    assert "model.router.softmax_after: unknown key" in message
    assert "did you mean model.router.softmax_after" not in message


def test_a_key_at_the_wrong_level_is_answered_with_the_right_one() -> None:
    assert "did you mean model.attention.qk_norm?" in refusal("model.qk_norm=head")


def test_several_mistakes_are_told_at_once() -> None:
    lines = refusal("train.stpes=3", "train.rate=nan", "name=[1]").splitlines()
    assert len(lines) == 3
    assert all(line.startswith("r.toml: ") for line in lines)


# ---- files and dumps --------------------------------------------------------------------------


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    for words in (
        [],
        ["model.router.kind=smart", "model.router.jitter=1e-5", "train.warmup=0.25"],
        ["model.attention.kv_heads=2", "name='a \"quoted\" name'", "sizes=[]"],
        *([f"model.router.kind={kind}", "model.router.top_k=4"] for kind in ROUTERS),
    ):
        made = read(*words)
        path = tmp_path / "resolved.toml"
        path.write_text(dump_toml(made), encoding="utf-8")
        assert validate(Recipe, read_toml(path), "again") == made


def test_dump_keeps_nested_optional_tables(tmp_path: Path) -> None:
    made = read("model.attention.rope_scaling.factor=4.0")
    assert made.model.attention.rope_scaling == RopeScaling(factor=4.0)
    path = tmp_path / "resolved.toml"
    path.write_text(dump_toml(made), encoding="utf-8")
    assert validate(Recipe, read_toml(path), "again") == made
    assert "capacity_factor" not in dump_toml(made)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"name = 'caf\xe9'", "not UTF-8 text (byte 11)"),
        (b"name = 'run'\nsteps = = 3", "line 2"),
        (b"[train]\nsteps = 1\nsteps = 2\n", "line 3"),
        (b"steps = " + b"9" * 5000, "TOML"),
    ],
    ids=["missing", "latin", "broken", "double", "long number"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_toml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_directory_and_a_file_in_the_way_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a directory; give a TOML file"):
        read_toml(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_toml(tmp_path / "file" / "recipe.toml")


def test_known_keys_reach_into_every_router_and_optional_table() -> None:
    known = set(known_keys(Recipe))
    for key in ("name", "train.steps", "model.router.mass", "model.router.update_rate"):
        assert key in known
    assert "model.attention.rope_scaling.factor" in known


def test_flatten_gives_dotted_plain_values() -> None:
    flat = flatten(read("model.router.kind=smart", "train.steps=7"))
    assert flat["train.steps"] == 7
    assert flat["model.router.kind"] == "smart"
    assert flat["train.warmup"] is None
    assert flat["sizes"] == [1, 2]
    assert not any(isinstance(value, dict) for value in flat.values())


def test_options_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Schedule().steps = 3  # type: ignore[misc]
