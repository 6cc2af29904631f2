"""Headers of safetensors files and JSON from strangers: sound to the last byte, or refused by name."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stock_directories import join_file, parts, read_all, split_file, unreadable

from moesaic.errors import CheckpointError
from moesaic.weights.manifest import Entry
from moesaic.weights.shards import SINGLE, Shards, read_json_file

pytestmark = pytest.mark.usefixtures("no_test_hangs")

Header = dict[str, Any]


def read_or_named(directory: Path) -> bool:
    """Whether it can be read, or is refused by a sentence that names the file."""
    try:
        return bool(read_all(directory))
    except CheckpointError as error:
        return f"{directory / SINGLE}: " in str(error)


# JSON, in a header and in a file of its own

DEEP = 10_000
MANY_KEYS = "{" + "".join(f'"k{number}":0,' for number in range(12_000)) + '"k11999":0}'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"{} {}", "is not JSON"),
        (b'{"\xff": 1}', "is not JSON"),
        (b"[" * DEEP + b"]" * DEEP, "is not JSON"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "is not JSON"),
        (b'{"a": NaN}', "holds NaN"),
        (b'{"a": [-Infinity]}', "holds -Infinity"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "holds a number of 5001 digits"),
        (b'{"a": {}, "a": {}}', "says 'a' twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F64"}}', "says 'dtype' twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "says '__metadata__' twice"),
    ],
)
def test_json_that_is_not_sound_is_refused(text: bytes, sentence: str, whole: Path, tmp_path: Path) -> None:
    join_file(whole / SINGLE, text, bytes(64))
    unreadable(whole, rf"model\.safetensors: {sentence}")
    (tmp_path / "some.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"some\.json: {sentence}"):
        read_json_file(tmp_path / "some.json")


def test_json_that_is_sound_is_read(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    with pytest.raises(CheckpointError, match=r"some\.json: is missing"):
        read_json_file(file)
    file.write_text('{"a": [1, 2.5, null, "é"]}', encoding="utf-8")
    assert read_json_file(file) == {"a": [1, 2.5, None, "é"]}
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_json_file(file, Entry("json", file.stat().st_size, digest)) == read_json_file(file)
    with pytest.raises(CheckpointError, match=r"some\.json: content does not match"):
        read_json_file(file, Entry("json", file.stat().st_size, "0" * 64))
    with pytest.raises(CheckpointError, match=r"some\.json: truncated"):
        read_json_file(file, Entry("json", 1000, digest))


def test_json_beyond_all_measure_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "some.json").open("wb") as file:
        file.truncate(2**40)  # sparse: it takes no room
    with pytest.raises(CheckpointError, match=r"some\.json: is 1099511627776 bytes long"):
        read_json_file(tmp_path / "some.json")


# The header as a whole


@pytest.mark.parametrize("length", [2**64 - 1, 30_000, 0])
def test_a_wrong_length_of_the_header_is_refused(length: int, whole: Path) -> None:
    header, data = split_file(whole / SINGLE)
    join_file(whole / SINGLE, header, data, length)
    unreadable(whole, r"model\.safetensors: (truncated|is not JSON)")


def test_a_header_beyond_all_measure_is_not_read(whole: Path) -> None:
    join_file(whole / SINGLE, b"{}", length=100_000_001)
    os.truncate(whole / SINGLE, 2**40)  # sparse: it takes no room
    unreadable(whole, r"model\.safetensors: truncated, or not a safetensors file")


@pytest.mark.parametrize("header", [[], None])
def test_a_header_that_is_no_table_is_refused(header: object, whole: Path) -> None:
    join_file(whole / SINGLE, header)
    unreadable(whole, r"model\.safetensors: its header is not a table")


@pytest.mark.parametrize("metadata", [5, None, {"a": {"b": "c"}}, {"x": "y" * 5000}])
def test_any_metadata_are_passed_over_or_refused(metadata: object, whole: Path) -> None:
    header, data = split_file(whole / SINGLE)
    join_file(whole / SINGLE, {**header, "__metadata__": metadata}, data)
    assert read_or_named(whole)


@pytest.mark.parametrize(
    "name", ["\ud800", "", "a" * 100_000, "\x1b[31mred\n"], ids=["surrogate", "empty", "long", "control"]
)
def test_any_name_of_a_tensor_is_read_or_refused(name: str, whole: Path) -> None:
    header, data = split_file(whole / SINGLE)
    header[name] = header.pop("lm_head.weight")
    join_file(whole / SINGLE, header, data)
    assert read_or_named(whole)


@pytest.mark.parametrize(
    "header",
    [MANY_KEYS.encode(), {"a": {"dtype": "F32", "shape": [2**39] * 35_000, "data_offsets": [0, 4]}}],
    ids=["many keys", "many dimensions"],
)
def test_small_bad_input_takes_no_time(header: object, whole: Path) -> None:
    """Work that grows with the square of such a file would let a larger one hang."""
    join_file(whole / SINGLE, header, bytes(4))
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        Shards(whole)
    assert time.process_time() - start < 0.5
    assert len(str(caught.value)) < 2000


# Its lines


def line(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        *({key: value for key, value in line().items() if key != left_out} for left_out in line()),
        line(dtype=7),
        line(shape=1),
        line(shape=[-1, -1]),  # whose product is right
        line(shape=[True]),
        line(shape=[1.0]),
        line(shape=[[1]]),
        line(shape=[2**40]),
        line(shape=[1] * 9),
        line(offsets=[0]),
        line(offsets=[0, 4, 4]),
        line(offsets=[0, 4.0]),
        line(shape=[0], offsets=[False, False]),
    ],
)
def test_a_line_that_describes_no_tensor_is_refused(entry: object, whole: Path) -> None:
    join_file(whole / SINGLE, {"a": entry}, bytes(4))
    unreadable(whole, r"model\.safetensors: the header's entry 'a' is not one of a tensor")


def test_a_line_at_the_limit_is_read(whole: Path) -> None:
    join_file(
        whole / SINGLE, {"a": line(shape=[1] * 8), "b": line(shape=[0, 2**40 - 1], offsets=[4, 4])}, bytes(4)
    )
    assert Shards(whole).read("a").shape == (1,) * 8


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I64", "f32"])
def test_quantised_and_integer_weights_are_refused_as_such(dtype: str, whole: Path) -> None:
    join_file(whole / SINGLE, {"a": line(dtype)}, bytes(4))
    unreadable(whole, r"model\.safetensors: a is .*quantised")


# Their places


def in_order(header: Header) -> list[Any]:
    """The lines of the tensors as their data follow one another."""
    return sorted((entry for entry in header.values() if "shape" in entry), key=lambda e: e["data_offsets"])


def overlap(lines: list[Any]) -> None:
    lines[1]["data_offsets"] = [offset - 4 for offset in lines[1]["data_offsets"]]


def same_place(lines: list[Any]) -> None:
    same = next(entry for entry in lines[1:] if entry["shape"] == lines[0]["shape"])
    same["data_offsets"] = lines[0]["data_offsets"]


def gap(lines: list[Any]) -> None:
    lines[-1]["data_offsets"] = [offset + 4 for offset in lines[-1]["data_offsets"]]


def before_the_start(lines: list[Any]) -> None:
    lines[0]["data_offsets"] = [offset - 4 for offset in lines[0]["data_offsets"]]


def beyond_the_end(lines: list[Any]) -> None:
    lines[-1]["shape"] = [2, *lines[-1]["shape"]]
    start, end = lines[-1]["data_offsets"]
    lines[-1]["data_offsets"] = [start, end + end - start]


def short_of_the_end(lines: list[Any]) -> None:
    lines[-1].update(shape=[0], data_offsets=lines[-1]["data_offsets"][:1] * 2)


def shape_too_small(lines: list[Any]) -> None:
    lines[3]["shape"] = [1]


def shape_beyond_64_bits(lines: list[Any]) -> None:
    lines[3]["shape"] = [2**32, 2**32]


def turned_around(lines: list[Any]) -> None:
    lines[3]["data_offsets"].reverse()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (overlap, "overlap or leave a gap"),
        (same_place, "overlap or leave a gap"),
        (gap, "overlap or leave a gap"),
        (before_the_start, "overlap or leave a gap at byte 0"),
        (beyond_the_end, "truncated"),
        (short_of_the_end, "too long"),
        (shape_too_small, "bytes where F32"),
        (shape_beyond_64_bits, "bytes where F32"),
        (turned_around, "bytes where F32"),
    ],
)
def test_tensors_must_lie_one_after_another_in_their_file(
    change: Callable[[list[Any]], None], sentence: str, whole: Path, sharded: Path
) -> None:
    for file in (whole / SINGLE, parts(sharded)[1]):
        header, data = split_file(file)
        change(in_order(header))
        join_file(file, header, data)
        unreadable(file.parent, rf"{file.name}: .*{sentence}")
