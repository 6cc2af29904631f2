"""Where text comes from: the standard library, files, the Hugging Face Hub, or tiny Shakespeare.

A source is a function from ``DataOptions`` to a ``Corpus`` and one line in ``SOURCES``. A corpus is a
set of labelled domains, each of which can be read again from its start as often as needed.
"""

import glob
import hashlib
import http.client
import json
import os
import random
import string
import sys
import sysconfig
import tokenize
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from moesaic.config import Options
from moesaic.data.cleaning import CleanOptions
from moesaic.data.readers import hub_library, hub_rows, read_texts, stem_of, text_of
from moesaic.errors import DataError
from moesaic.files import write_atomic

Texts: TypeAlias = Callable[[], Iterable[str]]

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
STDLIB_MAX_CHARS = 1_500_000
_RANDOM_CHARS = 200_000

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_NOT_CODE = {"idlelib", "pydoc_data", "lib2to3"}
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


class DataOptions(Options):
    """Which text to train on, how it becomes tokens, and how much of it is held out."""

    # random: letters without sense, to see that a machine runs; it teaches nothing.
    # curriculum: structured patterns (curriculum.py), those that come along or files of one's own.
    source: Literal[
        "stdlib", "tiny_shakespeare", "files", "hub", "instructions", "preferences", "curriculum", "random"
    ] = "stdlib"
    # A file or a glob (``**`` and ``~`` are understood), several, or domain label -> glob. A file's domain is
    # its name, a glob's the last folder before its first wildcard.
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
    clean: CleanOptions = CleanOptions()  # of texts: what is mended and what is left out
    # Whether attention stops at the borders of documents in a window; the loss does not.
    document_mask: bool = False
    # Domain -> its share of the training windows; not given: as it has text. They add up to 1.
    weights: dict[str, float] | None = None
    template: str | None = None  # of instructions: a file or a model directory; default: beside the tokenizer
    # Of instructions: how many training examples are halves of two, one after the other, so that a model sees
    # a change of domain in one text; and whether a row is filled up with examples, none of which sees
    # another.
    join: float = Field(0.0, ge=0, le=1)
    pack: bool = False
    cache: str | None = None  # default: $MOESAIC_CACHE, else ~/.cache/moesaic

    @model_validator(mode="after")
    def _source_fits_its_path(self) -> Self:
        if self.path is not None and self.source in ("stdlib", "hub", "random"):
            raise ValueError(f'path is given, but source={self.source} reads no path; set source="files"')
        if self.dataset is not None and self.source != "hub":
            raise ValueError(f'dataset is given, but source={self.source} reads none; set source="hub"')
        if self.source == "files" and not self.path:
            raise ValueError('source="files" needs path, a file or a glob such as "books/**/*.txt"')
        if self.source in ("instructions", "preferences") and self.max_chars is not None:
            raise ValueError("max_chars cuts texts, not conversations; use max_documents")
        if self.source != "instructions" and (self.join or self.pack):
            raise ValueError('join and pack are for source="instructions"')
        if self.source not in ("instructions", "preferences") and self.template:
            raise ValueError('template is for source="instructions" and source="preferences"')
        talks = self.source in ("instructions", "preferences", "curriculum")
        if talks and (self.clean != CleanOptions() or self.document_mask):
            raise ValueError("clean and document_mask are for texts, not for conversations")
        if self.weights is not None:
            if talks:
                raise ValueError(
                    "weights mix texts; instructions and preferences are drawn as often as they occur"
                )
            total = sum(self.weights.values())
            if min(self.weights.values(), default=-1.0) < 0 or abs(total - 1) > 1e-6:
                raise ValueError(
                    f"weights: are shares, none below 0, that add up to 1; these add up to {total:g}"
                )
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
    notes: tuple[str, ...] = ()

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


def files_by_domain(options: DataOptions) -> dict[str, list[Path]]:
    """The files that ``options.path`` names, by domain. Raises DataError for one that is not there."""
    found: dict[str, list[Path]] = {}
    if isinstance(options.path, dict):
        for label, pattern in options.path.items():
            found[label] = matches(pattern)
    else:
        patterns = [options.path] if isinstance(options.path, str) else options.path or []
        for pattern in patterns:
            paths = found.setdefault(_label(pattern), [])
            paths += [path for path in matches(pattern) if path not in paths]
    return found


def _files(options: DataOptions) -> Corpus:
    found = files_by_domain(options)
    texts: dict[str, Texts] = {label: partial(_read_files, paths, options) for label, paths in found.items()}
    every = [path for paths in found.values() for path in paths]
    status = [
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(every, map(_stat, every), strict=True)
    ]
    groups = [len(paths) for paths in found.values()]
    identity = {"source": "files", "field": options.field, "files": status, "groups": groups}
    summary = f"{len(every)} {'file' if len(every) == 1 else 'files'}"
    return Corpus(texts, identity, summary, options.max_chars, options.max_documents)


def _label(pattern: str) -> str:
    """The domain of one path or glob: a file's name, or the last folder before the first wildcard."""
    path = Path(pattern).expanduser()
    if path.exists() or not glob.has_magic(str(path)):
        return stem_of(path)
    fixed = list(takewhile(lambda part: not glob.has_magic(part), path.parts))
    return Path(*fixed).resolve().name or "files"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:  # a link to nothing, too
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def matches(pattern: str) -> list[Path]:
    """The files of one path or glob (``**`` and ``~`` are understood), sorted; none of them empty. Raises
    DataError."""
    try:
        plain = Path(pattern).expanduser()
    except RuntimeError:
        raise DataError(f"{pattern}: there is no such user's home") from None
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
        if _stat(path).st_size == 0:
            raise DataError(f"{path}: the file is empty; remove it or leave it out of data.path")
    return paths


def _read_files(paths: list[Path], options: DataOptions) -> Iterator[str]:
    for path in paths:
        yield from read_texts(path, options.field, options.max_line_bytes)


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
    write_atomic(file, content)
    return file


def _hub(options: DataOptions) -> Corpus:
    hub_library("data.source=hub")
    name = str(options.dataset)
    which = {"source", "dataset", "dataset_config", "dataset_split", "dataset_revision", "field"}
    identity = options.model_dump(include=which)
    texts = {name.rpartition("/")[2]: partial(_hub_texts, name, options)}
    return Corpus(texts, identity, f"Hub dataset {name}", options.max_chars, options.max_documents)


def _hub_texts(name: str, options: DataOptions) -> Iterator[str]:
    which = (options.dataset_config, options.dataset_split, options.dataset_revision)
    for where, row in hub_rows(name, *which):
        yield text_of(row, options.field, where)


def _random(options: DataOptions) -> Corpus:
    """Random letters, for a run that only shows that everything runs."""
    size, seed = options.max_chars or _RANDOM_CHARS, 0
    return Corpus(
        {"random": partial(_random_texts, size, seed)},
        {"source": "random", "size": size, "documents": options.max_documents},
        "random letters",
        max_documents=options.max_documents,
        notes=(
            "data.source = random: the text is random letters and TEACHES NOTHING; no loss of this run means "
            "anything",
        ),
    )


def _random_texts(size: int, seed: int) -> Iterator[str]:
    draw = random.Random(seed)
    while size > 0:
        words = ("".join(draw.choices(string.ascii_lowercase, k=draw.randint(1, 9))) for _ in range(200))
        text = " ".join(words)[:size]
        size -= len(text)
        yield text


SOURCES: dict[str, Callable[[DataOptions], Corpus]]
SOURCES = {
    "stdlib": _stdlib,
    "tiny_shakespeare": _tiny_shakespeare,
    "files": _files,
    "hub": _hub,
    "random": _random,
}
