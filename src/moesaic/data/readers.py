"""Rows and texts out of files (plain text, JSON lines, Parquet) and of datasets on the Hub. A reader is a
function and a line in ``READERS``."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from moesaic.errors import DataError


def _read_text(path: Path, field: str, max_line_bytes: int) -> Iterator[str]:
    try:
        # Bytes, not text mode: newlines stay as they are and an error knows its offset.
        with opened(path) as file:
            yield file.read().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _read_jsonl(path: Path, field: str, max_line_bytes: int) -> Iterator[str]:
    for where, row in read_rows(path, max_line_bytes):
        yield text_of(row, field, where)


def read_rows(path: Path, max_line_bytes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JSON object of a JSONL file with its ``file:line``, blank lines passed over, or each row of a
    Parquet file with its number.

    Raises DataError with file and line for broken UTF-8 or JSON, a key given twice, a line above
    ``max_line_bytes`` (never read whole) and a row that is no object; and for a file without rows.
    """
    if format_of(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    offset, number, found = 0, 0, False
    try:
        with opened(path) as file:
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


def text_of(row: Mapping[str, Any], name: str, where: str) -> str:
    """The text in field ``name`` of a row; raises DataError, naming ``where``, for a row without one."""
    if name not in row:
        raise DataError(f"{where}: no field {name!r}; set data.field to one of: {', '.join(row) or 'none'}")
    text = row[name]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {name!r} holds {type(text).__name__}, not a string")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: field {name!r} holds a lone surrogate, which is no character")
    return text


def _read_parquet(path: Path, field: str, max_line_bytes: int) -> Iterator[str]:
    for where, row in _parquet_rows(path, field):
        yield text_of(row, field, where)


def _parquet_rows(path: Path, only: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row; of it the column ``only`` alone, if the file has it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: Parquet needs pyarrow: pip install 'moesaic[parquet]'") from None
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [only] if only in file.schema_arrow.names else None
            for batch in file.iter_batches(columns=columns, batch_size=1024):
                for values in batch.to_pylist():
                    row += 1
                    yield f"{path}: row {row}", values
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a Parquet file, or damaged: {error}") from None
    if not row:
        raise DataError(f"{path}: holds no rows")


READERS: dict[str, Callable[[Path, str, int], Iterator[str]]]
READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet}


def read_texts(path: Path, field: str, max_line_bytes: int) -> Iterator[str]:
    """The texts of one file by its ending: JSONL and Parquet rows by ``field``, anything else whole.

    Raises DataError that names the file and the line or row.
    """
    yield from READERS.get(format_of(path), _read_text)(path, field, max_line_bytes)


def stem_of(path: Path) -> str:
    """A file's name without its ending, and without that of its compression."""
    return Path(path.stem).stem if path.suffix.lower() in _COMPRESSED else path.stem


def format_of(path: Path) -> str:
    """A file's ending in lower case, without that of its compression."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, which may be compressed (.gz, .zst). Raises OSError, and DataError for damage."""
    if path.suffix.lower() not in _COMPRESSED:
        with path.open("rb") as file:
            yield file
        return
    stream, damage = _COMPRESSED[path.suffix.lower()](path)
    try:
        with stream:
            yield stream
    except damage as error:
        raise DataError(f"{path}: damaged, or not compressed as its name says ({error})") from None


Opened = tuple[IO[bytes], tuple[type[Exception], ...]]  # a stream, and what it raises where it is damaged


def _open_gz(path: Path) -> Opened:
    return cast(IO[bytes], gzip.open(path, "rb")), (EOFError, zlib.error, gzip.BadGzipFile)


def _open_zst(path: Path) -> Opened:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: .zst needs zstandard: pip install 'moesaic[zstd]'") from None
    return io.BufferedReader(_Zst(path, zstandard)), (zstandard.ZstdError, EOFError)


class _Zst(io.RawIOBase):
    """Frames one after the other; the library's own stream takes a frame that is cut off for a whole one."""

    def __init__(self, path: Path, zstandard: Any) -> None:
        self._file, self._new = path.open("rb"), zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._ready, self._ahead = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self._ready:
            data = self._ahead or self._file.read(2**16)
            self._ahead = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("it is cut off")
                return 0
            self._frame = self._frame or self._new()
            self._ready = self._frame.decompress(data)
            if self._frame.eof:
                self._ahead, self._frame = self._frame.unused_data, None
        size = min(len(into), len(self._ready))
        into[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


_COMPRESSED: dict[str, Callable[[Path], Opened]] = {".gz": _open_gz, ".zst": _open_zst}


def hub_rows(
    name: str, config: str | None, split: str, revision: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a dataset on the Hub as they come over the network, each with where it stands. Raises
    DataError."""
    datasets, row = hub_library(f"dataset {name}"), 0
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        for row, values in enumerate(rows, 1):
            yield f"{name}: row {row}", values
    except DataError:
        raise
    except Exception as error:  # the network, the Hub and the formats raise whatever they like
        raise DataError(f"dataset {name}: cannot be read after row {row}: {error}") from error


def hub_library(what: str) -> Any:
    """The library ``datasets``. Raises DataError where it is not installed."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{what} needs datasets: pip install 'moesaic[hub]'") from None
    return datasets
