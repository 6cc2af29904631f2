"""Corpora: every source, every bad input, and that a corpus reads the same twice."""

import hashlib
import io
import json
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from moesaic.config import dump_toml, validate
from moesaic.data import corpora
from moesaic.data.corpora import DataOptions, Document, cache_folder, open_corpus
from moesaic.data.readers import read_rows
from moesaic.errors import DataError, RecipeError

SHAKESPEARE = Path(__file__).parents[1] / ".." / "shared" / "data" / "tiny_shakespeare.txt"


def files(path, **more) -> DataOptions:
    return DataOptions(source="files", path=path, **more)


def read(options: DataOptions) -> list[Document]:
    return list(open_corpus(options).documents())


def rows(path: Path, *lines: str | bytes) -> str:
    path.write_bytes(b"".join((x.encode() if isinstance(x, str) else x) + b"\n" for x in lines))
    return str(path)


# --- options ---


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"path": "a.txt"}, 'set source="files"'),
        ({"source": "hub", "dataset": "x", "path": "a.txt"}, 'set source="files"'),
        ({"dataset": "x"}, 'set source="hub"'),
        ({"source": "files"}, "needs path"),
        ({"source": "files", "path": []}, "needs path"),
        ({"source": "hub"}, "needs dataset"),
        ({"source": "tiny_shakespeare", "path": ["a", "b"]}, "takes one file"),
        ({"source": "web"}, "source"),
        ({"val_fraction": 0.0}, "val_fraction"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"max_chars": 0}, "max_chars"),
        ({"feild": "text"}, "did you mean field"),
    ],
)
def test_options_that_cannot_work_are_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        validate(DataOptions, table, "recipe.toml")


def test_options_survive_a_run_directory() -> None:
    import tomllib

    options = files({"a": "x/*.txt"}, max_chars=7)
    assert DataOptions.model_validate(tomllib.loads(dump_toml(options))) == options


def test_every_source_can_be_chosen() -> None:
    known = set(DataOptions.model_fields["source"].annotation.__args__)
    assert set(corpora.SOURCES) == known - {"instructions", "preferences", "curriculum"}  # which are no texts


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOESAIC_CACHE", raising=False)
    assert cache_folder(DataOptions()) == Path.home() / ".cache" / "moesaic"
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path))
    assert cache_folder(DataOptions()) == tmp_path
    assert cache_folder(DataOptions(cache="/else")) == Path("/else")


# --- the standard library ---


def test_stdlib_is_deterministic_and_labelled() -> None:
    options = DataOptions(max_chars=20_000)
    first, second = open_corpus(options), open_corpus(options)
    assert first.fingerprint() == second.fingerprint()
    documents = list(first.documents())
    assert documents == list(second.documents()) == list(first.documents())
    assert first.domains() == list(dict.fromkeys(d.domain for d in documents))
    assert {"prose", "code"} <= set(first.domains()) <= {"prose", "code", "tests", "tables"}
    for domain in first.domains():
        texts = [d.text for d in first.documents(domain)]
        assert 0 < sum(map(len, texts)) <= 20_000
    assert "Python" in first.describe()
    assert first.fingerprint() != open_corpus(DataOptions(max_chars=20_001)).fingerprint()


def test_stdlib_without_tests_and_with_broken_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("abc.py", "json/tool.py", "encodings/cp0.py", "idlelib/run.py", "site-packages/far.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (tmp_path / "broken.py").write_bytes(b"# \xe9\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("built = 1\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    corpus = open_corpus(DataOptions())
    assert corpus.domains() == ["code", "tables"]
    texts = [document.text for document in corpus.documents("code")]
    assert sorted(texts) == ["# abc.py\n", "# coding: latin-1\n# é\n", "# json/tool.py\n"]
    assert "left out as not valid text: 1" in corpus.describe()
    before = corpus.fingerprint()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_abc.py").write_text("assert True\n")
    corpus = open_corpus(DataOptions())
    assert corpus.domains() == ["code", "tests", "tables"]
    assert corpus.fingerprint() != before


def test_stdlib_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"data\.source=files"):
        open_corpus(DataOptions())


# --- files ---


def test_text_files_are_documents_and_keep_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark\r\nand \x00 NUL")
    (tmp_path / "a.md").write_text("# é")
    corpus = open_corpus(files([str(tmp_path / "a.md"), str(tmp_path / "b.txt")]))
    expected = [Document("# é", "a"), Document("with a mark\r\nand \x00 NUL", "b")]
    assert list(corpus.documents()) == list(corpus.documents()) == expected
    assert list(corpus.documents("b")) == expected[1:]
    assert corpus.describe() == "2 files: a, b"


def test_globs_labels_lists_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "x.txt").write_text("x")
    (tmp_path / "deep" / "y.txt").write_text("y")
    (tmp_path / "odd[1].txt").write_text("odd")
    monkeypatch.setenv("HOME", str(tmp_path))
    labelled = files({"all": "~/deep/**/*.txt", "odd": "~/odd[1].txt"})
    assert read(labelled) == [Document("x", "all"), Document("y", "all"), Document("odd", "odd")]
    listed = files([str(tmp_path / "deep" / "y.txt"), "~/deep/**"])
    assert read(listed) == [Document("y", "y"), Document("x", "deep"), Document("y", "deep")]


def test_limits_hold_in_each_domain(tmp_path: Path) -> None:
    for name in "ab":
        rows(tmp_path / f"{name}.jsonl", *(json.dumps({"text": t}) for t in ("one", "", "two", "three")))
    pattern = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert [d.text for d in read(files(pattern, max_chars=5))] == ["one", "tw"] * 2
    assert [d.text for d in read(files(pattern, max_chars=6))] == ["one", "two"] * 2
    assert [d.text for d in read(files(pattern, max_documents=2))] == ["one", "two"] * 2
    assert len({open_corpus(files(pattern, max_chars=n)).fingerprint() for n in (None, 5, 6)}) == 3


def test_fingerprint_follows_the_content_and_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows(path, '{"text": "a", "body": "b"}')
    first = open_corpus(files(str(path))).fingerprint()
    assert open_corpus(files(str(path))).fingerprint() == first
    assert open_corpus(files(str(path), field="body")).fingerprint() != first
    assert open_corpus(files({"label": str(path)})).fingerprint() != first
    rows(path, '{"text": "longer"}')
    assert open_corpus(files(str(path))).fingerprint() != first


def test_rows_with_a_mark_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"body": "one"}\r\n\n{"body": "\\u00e9"}')
    assert [d.text for d in read(files(str(path), field="body"))] == ["one", "é"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', r"not UTF-8 text \(byte 30 of the file\)"),
        ('{"text": ', "not valid JSON"),
        ("[1]", "no JSON object"),
        ('{"text": "a", "text": "b"}', "key 'text' appears twice"),
        ('{"text": "a", "more": {"k": 1, "k": 2}}', "key 'k' appears twice"),
        ('{"body": "a", "id": 3}', "no field 'text'; set data.field to one of: body, id"),
        ('{"text": 7}', "holds int, not a string"),
        ('{"text": null}', "holds NoneType, not a string"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": "' + "x" * 200 + '"}', "longer than 100 bytes"),
        ("[" * 100 + "]", "longer than 100 bytes"),
    ],
)
def test_bad_row_is_named_with_its_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = rows(tmp_path / "a.jsonl", '{"text": "good 1"}', "", line)
    with pytest.raises(DataError, match=message) as caught:
        read(files(path, max_line_bytes=100))
    assert str(caught.value).startswith(f"{path}:3: ")


def test_deep_nesting_and_huge_numbers_are_data_errors(tmp_path: Path) -> None:
    for line in ('{"text": ' + "[" * 100_000, '{"text": ' + "9" * 5000 + "}"):
        path = rows(tmp_path / "a.jsonl", line)
        with pytest.raises(DataError, match=r"a\.jsonl:1: "):
            read(files(path))


def test_a_long_line_is_never_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            assert size is not None
            assert 0 <= size <= 65
            return b"x" * size

    path = Path(rows(tmp_path / "a.jsonl", "x"))
    monkeypatch.setattr(Path, "open", lambda self, mode: Endless())
    with pytest.raises(DataError, match="longer than 64 bytes"):
        list(read_rows(path, 64))


def test_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", '{"text": "abc"}')
    assert [d.text for d in read(files(path, max_line_bytes=15))] == ["abc"]
    with pytest.raises(DataError, match="longer"):
        read(files(path, max_line_bytes=14))


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    rows(tmp_path / "blank.jsonl", "", " ")
    for name, message in [
        ("nothing.txt", "nothing.txt: no such file"),
        ("*.csv", "no file matches this glob"),
        ("", r"is a directory; give a glob such as .*/\*\*/\*\.txt"),
        ("empty.txt", "empty.txt: the file is empty"),
        ("bad.txt", r"bad.txt: not UTF-8 text \(byte 3\)"),
        ("blank.jsonl", "blank.jsonl: holds no rows"),
    ]:
        with pytest.raises(DataError, match=message):
            read(files(str(tmp_path / name)))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), path)
    assert read(files(path)) == [Document("one", "a"), Document("two", "a")]
    with pytest.raises(DataError, match=r"row 1: no field 'body'; set data.field to one of: text, id"):
        read(files(path, field="body"))
    with pytest.raises(DataError, match="row 1: field 'id' holds int"):
        read(files(path, field="id"))
    parquet.write_table(pyarrow.table({"text": ["one", None]}), path)
    with pytest.raises(DataError, match="row 2: field 'text' holds NoneType"):
        read(files(path))
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="holds no rows"):
        read(files(path))
    Path(path).write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file, or damaged"):
        read(files(path))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'moesaic\[parquet\]'"):
        read(files(str(tmp_path / "a.parquet")))


# --- downloads ---


def hub_with(monkeypatch: pytest.MonkeyPatch, answer) -> list[tuple]:
    """A stand-in for the datasets package; records how it was called."""
    calls: list[tuple] = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return answer()

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls


def test_hub_streams_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless():
        yield {"body": "one"}
        yield {"body": "two"}
        raise AssertionError("read past max_documents")

    calls = hub_with(monkeypatch, endless)
    options = DataOptions(
        source="hub",
        dataset="owner/set",
        dataset_config="en",
        dataset_split="val",
        field="body",
        max_documents=2,
    )
    assert read(options) == [Document("one", "set"), Document("two", "set")]
    assert calls == [(("owner/set", "en"), {"split": "val", "revision": None, "streaming": True})]
    other = options.model_copy(update={"dataset_revision": "abc"})
    assert open_corpus(options).fingerprint() != open_corpus(other).fingerprint()


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    options = DataOptions(source="hub", dataset="owner/set")

    def offline():
        raise ConnectionError("no network")

    hub_with(monkeypatch, offline)
    with pytest.raises(DataError, match=r"dataset owner/set: cannot be read after row 0: no network"):
        read(options)
    hub_with(monkeypatch, lambda: iter([{"text": "a"}, {"body": "b"}]))
    with pytest.raises(DataError, match=r"owner/set: row 2: no field 'text'; set data.field to one of: body"):
        read(options)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'moesaic\[hub\]'"):
        open_corpus(options)


def test_shakespeare_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = [b"To be", b"damaged on its way"]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(served.pop(0)))
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(b"To be").hexdigest())
    options = DataOptions(source="tiny_shakespeare", cache=str(tmp_path / "new"))
    assert read(options) == read(options) == [Document("To be", "shakespeare")]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tiny_shakespeare.txt"]
    (tmp_path / "new" / "tiny_shakespeare.txt").write_bytes(b"To bee")  # damaged: fetched again
    with pytest.raises(DataError, match=r"not the known text.*data\.path=FILE"):
        read(options)


def test_shakespeare_without_network_or_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url, timeout):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"no route.*data\.path=FILE"):
        read(DataOptions(source="tiny_shakespeare", cache=str(tmp_path)))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"set data\.cache"):
        read(DataOptions(source="tiny_shakespeare", cache=str(tmp_path / "file" / "in")))


def test_shakespeare_from_a_local_copy() -> None:
    if not SHAKESPEARE.exists():
        pytest.skip("../shared/data/tiny_shakespeare.txt is not here")
    (document,) = read(DataOptions(source="tiny_shakespeare", path=str(SHAKESPEARE)))
    assert document.domain == "shakespeare"
    assert len(document.text) == 1_115_394
    assert len(set(document.text)) == 65
    assert hashlib.sha256(document.text.encode()).hexdigest() == corpora.SHAKESPEARE_SHA256


def test_a_glob_is_one_domain_and_a_file_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("notes/a.md", "notes/deep/b.md", "poem.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name, encoding="utf-8")
    given = DataOptions(source="files", path=["notes/**/*.md", "poem.txt"])
    assert open_corpus(given).domains() == ["notes", "poem"]
    assert [d.text for d in open_corpus(given).documents("notes")] == ["notes/a.md", "notes/deep/b.md"]
    here = DataOptions(source="files", path="*.txt")
    assert open_corpus(here).domains() == [tmp_path.name]


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read"):
        open_corpus(DataOptions(source="files", path=str(tmp_path / "*.txt")))


@pytest.mark.parametrize("source", ["files", "tiny_shakespeare", "stdlib"])
def test_a_dataset_that_nobody_reads_is_refused(source: str) -> None:
    path = {"path": "x.txt"} if source == "files" else {}
    with pytest.raises(RecipeError, match="reads none"):
        validate(DataOptions, {"source": source, "dataset": "owner/name", **path}, where="data")
