"""Directories of safetensors from strangers: what is whole is read, all else is refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_directories import (
    cached,
    edit_json,
    exchange,
    flip,
    folder,
    join_file,
    link_out,
    link_to_device,
    parts,
    pipe,
    read_all,
    split_file,
    unreadable,
)

from moesaic.errors import CheckpointError
from moesaic.weights.shards import INDEX, SINGLE, Shards, read_json_file

pytestmark = pytest.mark.usefixtures("no_test_hangs")


def test_shards_hold_what_the_whole_file_holds(stock: dict[str, Path]) -> None:
    expected = load_file(stock["whole"] / SINGLE)
    for directory in (stock["whole"], stock["sharded"]):
        read = read_all(directory)
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in expected)
    stored = Shards(stock["whole"]).tensors["lm_head.weight"]
    assert (stored.shape, stored.dtype, stored.bytes) == ((40, 16), torch.float32, 40 * 16 * 4)


def test_what_is_read_is_not_the_file(whole: Path) -> None:
    before = (whole / SINGLE).read_bytes()
    Shards(whole).read("lm_head.weight").zero_()
    assert (whole / SINGLE).read_bytes() == before


def test_names_to_ignore_are_passed_over(stock: dict[str, Path]) -> None:
    for name in ("whole", "sharded"):
        assert not any("q_norm" in tensor for tensor in Shards(stock[name], ["q_norm.weight"]).tensors)


# Files


def test_a_file_that_is_missing_is_named(sharded: Path, tmp_path: Path) -> None:
    for path in parts(sharded):
        path.rename(tmp_path / "away")
        unreadable(sharded, rf"{path.name}: is missing")
        (tmp_path / "away").rename(path)
    read_all(sharded)
    (sharded / INDEX).unlink()
    unreadable(sharded, r"has neither model\.safetensors nor")
    unreadable(tmp_path / "nowhere", "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats_are_to_be_converted(name: str, whole: Path) -> None:
    (whole / SINGLE).rename(whole / name)
    unreadable(whole, rf"has neither .*{name} is not read: convert it to safetensors")


@pytest.mark.parametrize("length", [0, 7, 8, 100, -8, -1])
def test_a_truncated_file_is_named(length: int, whole: Path, sharded: Path) -> None:
    for file in (whole / SINGLE, parts(sharded)[1]):
        os.truncate(file, length if length >= 0 else file.stat().st_size + length)
        unreadable(file.parent, rf"{file.name}: (truncated|is not JSON)")


def test_trailing_bytes_are_refused(whole: Path, sharded: Path) -> None:
    for file in (whole / SINGLE, parts(sharded)[-1]):
        file.write_bytes(file.read_bytes() + b"\0")
        unreadable(file.parent, rf"{file.name}: too long")


def link_up(file: Path) -> None:
    file.rename(file.parent.parent / "outside")
    file.symlink_to("../outside")


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def link_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (link_out, "is a link out of its directory"),
        (link_up, "is a link out of its directory"),
        (link_to_device, "is not a regular file"),
        (link_to_nothing, "is missing"),
        (link_to_itself, ""),
        (pipe, "is not a regular file"),
        (folder, "is not a regular file"),
    ],
)
def test_what_is_no_file_of_this_directory_is_refused(
    spoil: Callable[[Path], None], sentence: str, sharded: Path
) -> None:
    file = parts(sharded)[1]
    spoil(file)
    unreadable(sharded, rf"{file.name}: {sentence}")
    with pytest.raises(CheckpointError, match=rf"{file.name}: {sentence}"):
        read_json_file(file)


@pytest.mark.parametrize("spoil", [link_out, pipe])
@pytest.mark.parametrize(("kind", "name"), [("whole", SINGLE), ("sharded", INDEX)])
def test_a_whole_file_and_an_index_are_looked_at_too(
    kind: str, name: str, spoil: Callable[[Path], None], stock: dict[str, Path], tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(stock[kind], tmp_path / kind))
    spoil(directory / name)
    unreadable(directory, rf"{name}: is (a link out of its directory|not a regular file)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(whole: Path, sharded: Path) -> None:
    for file in (whole / SINGLE, sharded / INDEX, parts(sharded)[1]):
        file.chmod(0)
        unreadable(file.parent, rf"{file.name}.*(P|p)ermission")
        file.chmod(0o600)
    (whole / SINGLE).unlink()
    whole.chmod(0o100)
    try:
        unreadable(whole, "model")
    finally:
        whole.chmod(0o700)


def test_a_link_inside_the_directory_is_followed(sharded: Path) -> None:
    file = parts(sharded)[1]
    file.rename(sharded / "there")
    file.symlink_to("there")
    assert len(read_all(sharded)) == len(json.loads((sharded / INDEX).read_text())["weight_map"])


# The index


def place(directory: Path, tensor: str, name: object) -> None:
    """Let the index say that ``tensor`` is in ``name``."""
    edit_json(directory / INDEX, lambda table: table["weight_map"].update({tensor: name}))


def test_two_shards_exchanged_are_seen(sharded: Path) -> None:
    exchange(*parts(sharded)[:2])
    unreadable(sharded, r"model-0000[12]-of-\d+\.safetensors: has no tensor \S+, which model\.safetensors\.i")


@pytest.mark.parametrize("tensor", ["lm_head.weight", "lm_head.bias"], ids=["elsewhere", "nowhere"])
def test_a_tensor_that_is_not_where_the_index_says_is_named(tensor: str, sharded: Path) -> None:
    last = parts(sharded)[-1].name
    place(sharded, tensor, last)
    unreadable(sharded, rf"{last}: has no tensor {tensor}, which")


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    one, two = parts(sharded)[:2]
    (line, values), (header, data) = split_file(one), split_file(two)
    start, end = line["lm_head.weight"]["data_offsets"]
    again = {**line["lm_head.weight"], "data_offsets": [len(data), len(data) + end - start]}
    join_file(two, {**header, "lm_head.weight": again}, data + values[start:end])
    unreadable(sharded, rf"{two.name}: lm_head\.weight is also in {one.name}")


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "/dev/zero", "sub/x.safetensors", "a\\b.safetensors", "a\0b.safetensors"),
        *("", ".hidden.safetensors", "x.bin"),
        *(5, None, ["x.safetensors"]),
    ],
)
def test_an_index_may_only_name_files_beside_it(name: object, sharded: Path, tmp_path: Path) -> None:
    (sharded / "sub").mkdir()
    for target in (tmp_path / "x.safetensors", sharded / "sub" / "x.safetensors"):
        shutil.copy(parts(sharded)[0], target)
    for spare in (".hidden.safetensors", "x.bin", "a\\b.safetensors"):
        shutil.copy(parts(sharded)[0], sharded / spare)
    place(sharded, "lm_head.weight", name)
    unreadable(sharded, r"index\.json: lm_head\.weight is in .*, which is no plain name")


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "\n"], ids=["long", "surrogate", "newline"])
def test_a_name_that_no_disk_has_is_refused(name: str, sharded: Path) -> None:
    place(sharded, "lm_head.weight", f"{name}.safetensors")
    unreadable(sharded, "safetensors")


@pytest.mark.parametrize("table", [[], {}, {"weight_map": {}}, {"weight_map": ["x"]}])
def test_an_index_without_a_table_is_refused(table: object, sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps(table))
    unreadable(sharded, r"index\.json: has no weight_map")


def test_an_index_that_says_a_tensor_twice_is_refused(sharded: Path) -> None:
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"lm_head.weight": "x",'))
    unreadable(sharded, r"index\.json: says 'lm_head\.weight' twice")


# The cache of huggingface_hub


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_cache_is_read_and_its_checksums_compared(
    kind: str, stock: dict[str, Path], tmp_path: Path
) -> None:
    snapshot = cached(stock[kind], tmp_path)
    assert read_all(snapshot).keys() == load_file(stock["whole"] / SINGLE).keys()
    (tmp_path / "elsewhere").symlink_to(snapshot)
    assert read_all(tmp_path / "elsewhere").keys() == read_all(snapshot).keys()
    for file in snapshot.glob("model*.safetensors"):
        blob = file.resolve()
        before = flip(blob, 8 * blob.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=rf"{blob.name}: content does not match"):
            read_all(snapshot)
        blob.write_bytes(before)
    read_all(snapshot)


def test_a_cache_may_not_link_out_of_its_blobs(stock: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(stock["sharded"], tmp_path)
    file = parts(snapshot)[1]
    file.resolve().rename(tmp_path / "outside")
    file.unlink()
    file.symlink_to("../../../outside")
    unreadable(snapshot, rf"{file.name}: is a link out of its directory")


def test_blobs_belong_to_a_cache_alone(stock: dict[str, Path], tmp_path: Path) -> None:
    snapshot = cached(stock["whole"], tmp_path)
    elsewhere = snapshot.parent.rename(tmp_path / "models--x" / "revisions") / snapshot.name
    unreadable(elsewhere, rf"{SINGLE}: is a link out of its directory")
