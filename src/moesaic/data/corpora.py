"""Where text comes from: the standard library, files, the Hugging Face Hub, or tiny Shakespeare.

A source is a function from ``DataOptions`` to a ``Corpus`` and one line in ``SOURCES``. A corpus is a
set of labelled domains, each of which can be read again from its start as often as needed.
"""

import glob
import hashlib
import http.client
import json
import os
import sys
import sysconfig
import tokenize
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from moesaic.config import Options
from moesaic.errors import DataError

Texts: TypeAlias = Callable[[], Iterable[str]]

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB_MAX_CHARS = 1_500_000

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_CODE = {"idlelib", "pydoc_data", "lib2to3"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class DataOptions(Options):
    """Which text to train on, how it becomes tokens, and how much of it is held out."""

    source: Literal["stdlib", "tiny_shakespeare", "files", "hub"] = "stdlib"
    # A file or a glob (``**`` and ``~`` are understood), several, or domain label -> glob.
    path: str | list[str] | dict[str, str] | None = None
    dataset: str | None = None  # hub only, as are the next three
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_revision: str | None = None
    field: str = Field("text", min_length=1)  # the column of JSONL, Parquet and hub rows
    max_documents: int | None = Field(None, ge=1)  # in each domain
    max_chars: int | None = Field(None, ge=1)  # in each domain; 1,500,000 for stdlib when not given
    max_line_bytes: int = Field(16 * 2**20, ge=1)  # of one JSONL row
    tokenizer: str = Field("char", min_length=1)  # char, byte, bpe, or the path of a tokenizer.json
    vocab_size: int = Field(4096, ge=1)  # read when the tokenizer is bpe
    val_fraction: float = Field(0.1, gt=0, lt=1)  # the tail of each domain
    cache: str | None = None  # default: $MOESAIC_CACHE, else ~/.cache/moesaic

    @model_validator(mode="after")
    def _source_fits_its_path(self) -> Self:
        if self.path is not None and self.source in ("stdlib", "hub"):
            raise ValueError(f'path is given, but source={self.source} reads no path; set source="files"')
        if self.dataset is not None and self.source == "stdlib":
            raise ValueError('dataset is given, but source=stdlib reads none; set source="hub"')
        if self.source == "files" and not self.path:
            raise ValueError('source="files" needs path, a file or a glob such as "books/**/*.txt"')
        if self.source == "hub" and not self.dataset:
            raise ValueError('source="hub" needs dataset, a name such as "owner/name"')
        if self.source == "tiny_shakespeare" and not isinstance(self.path, str | None):
            raise ValueError('source="tiny_shakespeare" takes one file as path; for more set source="files"')
        return self


@dataclass(frozen=True)
class Document:
    """One text and the label of the domain it belongs to."""

    text: str
    domain: str


@dataclass(frozen=True)
class Corpus:
    """Labelled domains of text, in an order that does not change from one reading to the next.

    ``texts`` maps a domain to a function that starts reading it afresh. ``identity`` holds what tells
    this content from another without reading it. Readers add to ``left_out`` the files they skipped.
    """

    texts: Mapping[str, Texts]
    identity: Mapping[str, Any]
    summary: str
    max_chars: int | None = None
    max_documents: int | None = None
    left_out: set[str] = field(default_factory=set)

    def domains(self) -> list[str]:
        """The labels, in reading order."""
        return list(self.texts)

    def documents(self, domain: str | None = None) -> Iterator[Document]:
        """Every document, domain after domain, or those of one; raises DataError where text is bad."""
        for label in self.texts if domain is None else [domain]:
            room = sys.maxsize if self.max_chars is None else self.max_chars
            for text in islice((t for t in self.texts[label]() if t), self.max_documents):
                yield Document(text[:room], label)
                room -= len(text)
                if room <= 0:
                    break

    def fingerprint(self) -> str:
        """SHA-256 of what identifies the content and of the limits put on it."""
        whole = [dict(self.identity), self.domains(), self.max_chars, self.max_documents]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def describe(self) -> str:
        """One line for people; files that could not be read count once a reading has met them."""
        names = self.domains()
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        skipped = f"; left out as not valid text: {len(self.left_out)}" if self.left_out else ""
        return f"{self.summary}: {shown}{skipped}"


def open_corpus(options: DataOptions) -> Corpus:
    """The corpus that ``options`` name. Raises DataError when it is not there or cannot be read."""
    return SOURCES[options.source](options)


def cache_folder(options: DataOptions) -> Path:
    """Where downloads and tokens are kept; it need not exist yet."""
    named = options.cache or os.environ.get("MOESAIC_CACHE") or "~/.cache/moesaic"
    return Path(named).expanduser()


def _stdlib(options: DataOptions) -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files: dict[str, list[Path]] = {"prose": [], "code": [], "tests": [], "tables": []}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        for name in names:
            path = Path(folder, name)
            domain = _stdlib_domain(path.relative_to(root))
            if domain and path.is_file():
                files[domain].append(path)
    left_out: set[str] = set()
    texts: dict[str, Texts] = {}
    sizes: dict[str, list[tuple[str, int]]] = {}
    for domain, paths in files.items():
        # Scattered, so that the end of a domain, which is held out, looks like its beginning.
        paths.sort(key=lambda path: _scatter(path.relative_to(root).as_posix()))
        if paths:
            texts[domain] = _topics if domain == "prose" else partial(_modules, paths, left_out)
            sizes[domain] = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths]
    if not texts:
        raise DataError(f"{root}: this Python has no standard library source; set data.source=files")
    identity = {"source": "stdlib", "python": sys.version, "sizes": sizes}
    summary = f"the standard library of Python {sys.version.split()[0]}"
    max_chars = options.max_chars or STDLIB_MAX_CHARS
    return Corpus(texts, identity, summary, max_chars, options.max_documents, left_out)


def _stdlib_domain(path: Path) -> str | None:
    """Of a path relative to the library; None for what is no text to learn from."""
    folders = path.parts[:-1]
    if path.as_posix() == "pydoc_data/topics.py":
        return "prose"
    if path.suffix != ".py" or path.name.startswith("_sysconfigdata"):  # the latter is build output
        return None
    if _TEST_FOLDERS.intersection(folders):
        return "tests"
    if folders[:1] == ("encodings",):
        return "tables"
    return None if _NOT_CODE.intersection(folders) else "code"


def _scatter(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics

    for name in sorted(topics, key=_scatter):
        yield topics[name]


def _modules(paths: list[Path], left_out: set[str]) -> Iterator[str]:
    for path in paths:
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # the tests hold files that are broken on purpose
            left_out.add(path.as_posix())
        else:
            yield text


def _files(options: DataOptions) -> Corpus:
    found: dict[str, list[Path]] = {}
    if isinstance(options.path, dict):
        for label, pattern in options.path.items():
            found[label] = _matches(pattern)
    else:
        patterns = [options.path] if isinstance(options.path, str) else options.path or []
        for path in dict.fromkeys(path for pattern in patterns for path in _matches(pattern)):
            found.setdefault(path.stem, []).append(path)
    texts: dict[str, Texts] = {label: partial(_read_files, paths, options) for label, paths in found.items()}
    every = [path for paths in found.values() for path in paths]
    status = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in every]
    groups = [len(paths) for paths in found.values()]
    identity = {"source": "files", "field": options.field, "files": status, "groups": groups}
    summary = f"{len(every)} {'file' if len(every) == 1 else 'files'}"
    return Corpus(texts, identity, summary, options.max_chars, options.max_documents)


def _matches(pattern: str) -> list[Path]:
    """The files of one path or glob, sorted; none of them empty."""
    plain = Path(pattern).expanduser()
    if plain.is_dir():
        raise DataError(f"{plain}: is a directory; give a glob such as {plain}/**/*.txt")
    if plain.exists():
        paths = [plain]
    elif glob.has_magic(str(plain)):
        paths = [p for p in map(Path, sorted(glob.glob(str(plain), recursive=True))) if not p.is_dir()]
        if not paths:
            raise DataError(f"{pattern}: no file matches this glob")
    else:
        raise DataError(f"{plain}: no such file")
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; remove it or leave it out of data.path")
    return paths


def _read_files(paths: list[Path], options: DataOptions) -> Iterator[str]:
    for path in paths:
        yield from READERS.get(path.suffix.lower(), _read_text)(path, options)


def _read_text(path: Path, options: DataOptions) -> Iterator[str]:
    try:
        # Bytes, not text mode: newlines stay as they are and an error knows its offset.
        yield path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_jsonl(path: Path, options: DataOptions) -> Iterator[str]:
    for where, row in read_rows(path, options.max_line_bytes):
        yield _text_of(row, options.field, where)


def read_rows(path: Path, max_line_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a JSONL file with its ``file:line``; blank lines are passed over.

    Raises DataError with file and line for broken UTF-8 or JSON, a key given twice, a line above
    ``max_line_bytes`` (never read whole) and a row that is no object; and for a file without rows.
    """
    offset, number, found = 0, 0, False
    try:
        with path.open("rb") as file:
            while line := file.readline(max_line_bytes + 1):
                number += 1
                where = f"{path}:{number}"
                if len(line) > max_line_bytes and not line.endswith(b"\n"):
                    raise DataError(
                        f"{where}: the line is longer than {max_line_bytes} bytes (max_line_bytes)"
                    )
                row = _parse_row(line, where, offset)
                if row is not None:
                    found = True
                    yield where, row
                offset += len(line)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise DataError(f"{path}: holds no rows; write one JSON object on each line")


def _parse_row(line: bytes, where: str, offset: int) -> dict[str, Any] | None:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {offset + error.start} of the file)") from None
    text = text.removeprefix("\ufeff") if offset == 0 else text
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_distinct)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: the line is no JSON object; write one object on each line")
    return row


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"the key {twice!r} appears twice in one object; keep one of them")
    return row


def _text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; set data.field to one of: {', '.join(row) or 'none'}")
    text = row[name]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {name!r} holds {type(text).__name__}, not a string")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: field {name!r} holds a lone surrogate, which is no character")
    return text


def _read_parquet(path: Path, options: DataOptions) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'moesaic[parquet]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [options.field] if options.field in names else names
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for values in batch.to_pylist():
                    row += 1
                    yield _text_of(values, options.field, f"{path}: row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {error}") from None
    if not row:
        raise DataError(f"{path}: holds no rows")


READERS: dict[str, Callable[[Path, DataOptions], Iterator[str]]]
READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}


def _tiny_shakespeare(options: DataOptions) -> Corpus:
    path = options.path or str(_downloaded_shakespeare(cache_folder(options)))
    return _files(options.model_copy(update={"path": {"shakespeare": path}}))


def _downloaded_shakespeare(cache: Path) -> Path:
    file = cache / "tiny_shakespeare.txt"
    advice = "pass a local copy with data.source=tiny_shakespeare data.path=FILE"
    try:
        if file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == SHAKESPEARE_SHA256:
            return file
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{cache}: the cache cannot be used ({error.strerror}); set data.cache") from None
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{SHAKESPEARE_URL} cannot be fetched ({error}); {advice}") from None
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise DataError(f"what {SHAKESPEARE_URL} sent is not the known text (SHA-256 differs); {advice}")
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, file)
    return file


def _hub(options: DataOptions) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise DataError("data.source=hub needs datasets: pip install 'moesaic[hub]'") from None
    name = str(options.dataset)
    which = {"source", "dataset", "dataset_config", "dataset_split", "dataset_revision", "field"}
    identity = options.model_dump(include=which)
    texts = {name.rpartition("/")[2]: partial(_hub_texts, datasets.load_dataset, name, options)}
    return Corpus(texts, identity, f"Hub dataset {name}", options.max_chars, options.max_documents)


def _hub_texts(load: Callable[..., Any], name: str, options: DataOptions) -> Iterator[str]:
    row, which = 0, {"split": options.dataset_split, "revision": options.dataset_revision}
    try:
        for row, values in enumerate(load(name, options.dataset_config, **which, streaming=True), 1):
            yield _text_of(values, options.field, f"{name}: row {row}")
    except DataError:
        raise
    except Exception as error:  # the network, the Hub and the formats raise whatever they like
        raise DataError(f"data.dataset={name}: cannot be read after row {row}: {error}") from error


SOURCES: dict[str, Callable[[DataOptions], Corpus]]
SOURCES = {"stdlib": _stdlib, "tiny_shakespeare": _tiny_shakespeare, "files": _files, "hub": _hub}
