"""Instruction data built of datasets: columns to rows, counts, shuffling, and datasets that are gone."""

import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moesaic.data.build import BuildOptions, build, build_recipe, builtin_mixes
from moesaic.data.corpora import DataOptions
from moesaic.data.instructions import read_examples
from moesaic.data.pretrain import prepare
from moesaic.errors import DataError, RecipeError

quiet = lambda _: None  # noqa: E731


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def built(tmp_path: Path, *sources: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    out = tmp_path / "out.jsonl"
    build(BuildOptions.model_validate({"source": list(sources), **more}), out, quiet)
    return [json.loads(line) for line in out.read_text().splitlines()]


def questions(tmp_path: Path, count: int = 40) -> Path:
    rows = [
        {"question": f"{n}+1?", "answer": str(n + 1), "table": {"header": ["a", "b"]}} for n in range(count)
    ]
    return jsonl(tmp_path / "questions.jsonl", rows)


SUMS = {"domain": "sums", "instruction": "Say {question}", "output": "{answer}", "rows": 10}


def test_places_are_filled_from_columns(tmp_path: Path) -> None:
    rows = built(tmp_path, {**SUMS, "path": str(questions(tmp_path)), "input": "table({table.header})"})
    assert len(rows) == 10
    for row in rows:
        number = int(row["output"])
        wanted = {"domain": "sums", "instruction": f"Say {number - 1}+1?", "input": "table(a, b)"}
        assert row == {**wanted, "output": str(number)}


def test_any_row_may_be_taken_and_the_seed_decides(tmp_path: Path) -> None:
    source = {**SUMS, "path": str(questions(tmp_path))}
    draws = []
    for seed in range(60):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        draws.append([row["output"] for row in built(tmp_path, source, seed=seed)])
    taken = Counter(number for draw in draws for number in draw)
    assert set(taken) == {str(n + 1) for n in range(40)}  # each is missed with (3/4)^60 = 3e-8
    assert max(taken.values()) < 32  # 15 are expected of each
    (tmp_path / "out.jsonl").unlink()
    assert [row["output"] for row in built(tmp_path, source, seed=59)] == draws[-1]
    assert draws[-1] != sorted(draws[-1], key=int)


def test_domains_are_mixed_and_the_file_is_read_by_training(tmp_path: Path) -> None:
    talk = jsonl(tmp_path / "talk.jsonl", [{"dialog": [f"Hi {n} .", " Hello", "Bye"]} for n in range(30)])
    chats = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
        for n in range(30)
    ]
    sources = (
        {**SUMS, "path": str(questions(tmp_path)), "rows": 30},
        {"domain": "actor", "path": str(talk), "turns": "dialog", "rows": 20},
        {
            "domain": "guardian",
            "path": str(jsonl(tmp_path / "chats.jsonl", chats)),
            "messages": "messages",
            "rows": 9,
        },
    )
    rows = built(tmp_path, *sources)
    assert Counter(row["domain"] for row in rows) == {"sums": 30, "actor": 20, "guardian": 9}
    assert len({row["domain"] for row in rows[:12]}) > 1
    turns = next(row for row in rows if row["domain"] == "actor")["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]  # a last question has no answer
    examples = list(read_examples(tmp_path / "out.jsonl"))
    assert len(examples) == 59
    options = DataOptions(source="instructions", path=str(tmp_path / "out.jsonl"), tokenizer="byte")
    assert set(prepare(options, seq_len=128).domains) == {"sums", "actor", "guardian"}


def test_parquet_and_parts_of_a_text(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = {"title": ["Mill", "Empty"], "text": ["It turns. Always.\n\nMore.", ""]}
    folder = tmp_path / "copies" / "owner" / "pages" / "en" / "train"
    folder.mkdir(parents=True)
    import pyarrow

    parquet.write_table(pyarrow.table(table), folder / "part-0.parquet")
    (folder.parent / "validation").mkdir()
    parquet.write_table(
        pyarrow.table({"title": ["No"], "text": ["No."]}), folder.parent / "validation" / "p.parquet"
    )
    common = {"domain": "pages", "dataset": "owner/pages", "config": "en", "instruction": "{title}?"}
    rows = built(
        tmp_path,
        {**common, "output": "{text|paragraph}"},
        {**common, "output": "{text|sentence}"},
        local=str(tmp_path / "copies"),
    )
    assert sorted(row["output"] for row in rows) == ["It turns.", "It turns. Always."]


def test_a_dataset_that_is_gone_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        raise RuntimeError("Dataset scripts are no longer supported")

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    said: list[str] = []
    sources = [
        {"domain": "gone", "dataset": "owner/gone", "config": "x", "turns": "dialog"},
        {**SUMS, "path": str(questions(tmp_path))},
        {**SUMS, "path": str(questions(tmp_path)), "output": "{solution}"},
    ]
    out = tmp_path / "out.jsonl"
    taken = build(BuildOptions.model_validate({"source": sources}), out, said.append)
    assert calls == [(("owner/gone", "x"), {"split": "train", "revision": None, "streaming": True})]
    assert [len(one.rows) for one in taken] == [0, 10, 0]
    assert any("owner/gone: it is left out" in s and "no longer supported" in s for s in said)
    assert any("has no column 'solution'; it has question, answer, table" in s for s in said)
    assert len(out.read_text().splitlines()) == 10


def test_repeats_and_what_teaches_nothing_are_passed_over(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "b"}, {"q": "a", "a": "b"}, {"q": "c", "a": " "}, {"q": "d", "a": "x" * 500}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    source = {"domain": "d", "path": str(file), "instruction": "{q}", "output": "{a}", "longest": 200}
    assert [row["instruction"] for row in built(tmp_path, source)] == ["a"]


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    nothing = BuildOptions.model_validate({"source": [{**SUMS, "path": str(tmp_path / "none.jsonl")}]})
    with pytest.raises(DataError, match="no source gave a row"):
        build(nothing, out, quiet)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RecipeError, match="exists"):
        build(nothing, out, quiet)
    assert out.read_text() == "mine"
    file = tmp_path / "bad.toml"
    for text, sentence in (
        ('[[source]]\ndomain = "d"\ndataset = "x"\n', "give one of"),
        ('[[source]]\ndomain = "d"\noutput = "{a}"\ninstruction = "{b}"\n', "give dataset"),
        (
            '[[source]]\ndomain = "d"\ndataset = "x"\noutput = "{a}"\n',
            "instruction, input and output go together",
        ),
        ('[[source]]\ndomain = "d"\ndataset = "x"\nturns = "t"\ninput = "{a}"\n', "go together"),
        ('[[source]]\ndomain = "d"\ndataset = "x"\npath = "y"\nturns = "t"\n', "one of them"),
        (
            '[[source]]\ndomain = "d"\npath = "y"\nsplit = "test"\nturns = "t"\n',
            "path names its files itself",
        ),
        ("source = []\n", "source"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            build_recipe(str(file), [])


def test_the_eight_roles_come_along() -> None:
    options = build_recipe("roles", ["local=copies", "seed=3"])
    assert (options.local, options.seed) == ("copies", 3)
    roles = {"actor", "analyst", "coder", "encyclopedia", "guardian", "summarizer", "thinker", "writer"}
    assert {source.domain for source in options.source} == roles


def test_olmoes_sources_come_along_with_the_columns_that_they_have(tmp_path: Path) -> None:
    options = build_recipe("olmoe-sft", [f"local={tmp_path / 'copies'}"])
    assert list(builtin_mixes()) == ["olmoe-sft", "roles"]
    assert sum(source.rows for source in options.source) == 608_012  # arXiv 2409.02060, table 3
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    shared = [{"from": "User", "value": "hello"}, {"from": "Assistant", "value": "hey"}]
    columns: dict[str, dict[str, Any]] = {
        "allenai/tulu-v2-sft-mixture": {"dataset": "flan", "id": "1", "messages": talk},
        "HuggingFaceH4/no_robots": {"prompt": "hello", "messages": [*talk, *talk], "category": "Chat"},
        "m-a-p/CodeFeedback-Filtered-Instruction": {"query": "sort", "answer": "sorted()", "lang": "python"},
        "meta-math/MetaMathQA": {"query": "1+1?", "response": "2", "type": "GSM_Rephrased"},
        "nvidia/Daring-Anteater": {"system": "", "mask": "User", "conversations": shared},
    }
    assert {source.dataset for source in options.source} == set(columns)
    for name, row in columns.items():
        jsonl(tmp_path / "copies" / name / "train.jsonl", [row])
    build(options, tmp_path / "sft.jsonl", quiet)
    written = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    by_domain = {row["domain"]: row for row in written}
    assert set(by_domain) == {"tulu", "no_robots", "code", "math", "anteater"}
    assert by_domain["anteater"]["messages"][1] == {"role": "assistant", "content": "hey"}
    assert by_domain["math"]["output"] == "2"
    examples = list(read_examples(tmp_path / "sft.jsonl"))
    assert len(examples) == 5


def test_random_text_says_that_it_teaches_nothing(tmp_path: Path) -> None:
    options = DataOptions(source="random", max_chars=3000, cache=str(tmp_path))
    store = prepare(options, seq_len=16)
    assert any("TEACHES NOTHING" in note for note in store.notes)
    assert store.train_tokens == 2700
    assert prepare(options, seq_len=16).fingerprint == store.fingerprint


def test_what_strangers_write_is_passed_over_or_told_safely(tmp_path: Path) -> None:
    rows = [{"q": "a", "a": "\ud800"}, {"q": "b", "a": "c"}]
    source = {
        "domain": "d",
        "path": str(jsonl(tmp_path / "rows.jsonl", rows)),
        "instruction": "{q}",
        "output": "{a}",
    }
    assert [row["instruction"] for row in built(tmp_path, source)] == ["b"]
    said: list[str] = []
    odd = {**source, "path": str(jsonl(tmp_path / "odd.jsonl", [{"\x1b[31mq": "a"}]))}
    (tmp_path / "out.jsonl").unlink()
    build(BuildOptions.model_validate({"source": [odd, source]}), tmp_path / "out.jsonl", said.append)
    assert not any("\x1b" in sentence for sentence in said)
    (tmp_path / "out.jsonl").unlink()
    nested = jsonl(tmp_path / "deep" / "er" / "rows.jsonl", rows)
    glob = {**source, "path": str(nested.parent.parent / "**" / "*.jsonl")}
    assert len(built(tmp_path, glob)) == 1
    for path in ("~nobody-has-this-name/x", str(tmp_path / "**.none")):
        with pytest.raises(DataError, match="no source gave a row"):
            build(BuildOptions.model_validate({"source": [{**source, "path": path}]}), tmp_path / "o", quiet)
    with pytest.raises((RecipeError, DataError)):
        build(BuildOptions.model_validate({"source": [source]}), tmp_path / "rows.jsonl" / "x" / "o", quiet)


def test_a_copy_without_the_split_is_not_another_one(tmp_path: Path) -> None:
    jsonl(tmp_path / "owner" / "set" / "train.jsonl", [{"q": "a", "a": "b"}])
    jsonl(tmp_path / "owner" / "set" / "dataset_infos.json", ["no rows"])
    source = {"domain": "d", "dataset": "owner/set", "instruction": "{q}", "output": "{a}"}
    assert len(built(tmp_path, source, local=str(tmp_path))) == 1
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(DataError, match="no source gave a row"):
        built(tmp_path, {**source, "split": "validation"}, local=str(tmp_path))
