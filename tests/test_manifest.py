"""A checkpoint that differs from what was written in any way is not believed."""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.errors import CheckpointError
from moesaic.weights.checkpoint import read_checkpoint, read_json, read_tensors, write_checkpoint
from moesaic.weights.contents import Contents
from moesaic.weights.manifest import verify


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-00000100"
    contents = Contents(
        tensors={
            "model.safetensors": {"w": torch.arange(12.0).reshape(3, 4)},
            "optimizer.safetensors": {"w": torch.arange(12.0, 24.0).reshape(3, 4)},
        },
        json={"state.json": {"step": 100, "seed": 7}},
        files={"tokenizer.json": b'{"a": 1}'},
    )
    write_checkpoint(directory, contents)
    return directory


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; returns the bytes that were there."""
    before = path.read_bytes()
    after = bytearray(before)
    after[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(after)
    return before


def test_every_flipped_bit_is_found(checkpoint: Path) -> None:
    verify(checkpoint)
    manifest = checkpoint / "manifest.json"
    flips = [(manifest, bit) for bit in range(8 * manifest.stat().st_size)]
    rng = random.Random(0)
    for _ in range(1000):
        path = rng.choice(sorted(checkpoint.iterdir()))
        flips.append((path, rng.randrange(8 * path.stat().st_size)))
    for path, bit in flips:
        before = flip(path, bit)
        with pytest.raises(CheckpointError, match=re.escape(str(checkpoint))):
            verify(checkpoint)
        path.write_bytes(before)
    verify(checkpoint)


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 50)


def lengthen(directory: Path) -> None:
    with open(directory / "model.safetensors", "ab") as file:
        file.write(b"\0")


def empty(directory: Path) -> None:
    os.truncate(directory / "manifest.json", 0)


def swap(directory: Path) -> None:
    os.rename(directory / "model.safetensors", directory / "spare")
    os.rename(directory / "optimizer.safetensors", directory / "model.safetensors")
    os.rename(directory / "spare", directory / "optimizer.safetensors")


def remove(directory: Path) -> None:
    (directory / "state.json").unlink()


def remove_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def add(directory: Path) -> None:
    (directory / "extra.bin").write_bytes(b"")


def add_directory(directory: Path) -> None:
    (directory / "more").mkdir()


def link(directory: Path) -> None:
    os.rename(directory / "state.json", directory.parent / "state.json")
    os.symlink(directory.parent / "state.json", directory / "state.json")


def pipe(directory: Path) -> None:
    (directory / "state.json").unlink()
    os.mkfifo(directory / "state.json")


def duplicate_key(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2,\n "format": 1'))


def nest(directory: Path) -> None:
    (directory / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, r"model\.safetensors: truncated \(50 bytes instead of 144\)"),
        (lengthen, r"model\.safetensors: too long \(145 bytes instead of 144\)"),
        (empty, r"manifest\.json: is not the JSON"),
        (swap, r"model\.safetensors: content does not match its checksum"),
        (remove, r"state\.json: is missing"),
        (remove_manifest, r"manifest\.json: is missing"),
        (add, r"extra\.bin: is not listed"),
        (add_directory, r"more: is not listed"),
        (link, r"state\.json: is a symbolic link"),
        (pipe, r"state\.json: is not a regular file"),
        (duplicate_key, r"manifest\.json: does not hold the bytes"),
        (nest, r"manifest\.json: is not the JSON"),
    ],
)
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], None], sentence: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=sentence):
        verify(checkpoint)
    with pytest.raises(CheckpointError, match=sentence):
        read_checkpoint(checkpoint)


def forge(directory: Path, change: Callable[[dict], None]) -> None:
    """Rewrite the manifest with a digest that is right."""
    table = json.loads((directory / "manifest.json").read_text())
    del table["digest"]
    change(table)

    def text(value: object) -> str:
        return json.dumps(value, indent=1, sort_keys=True) + "\n"

    table["digest"] = hashlib.sha256(text(table).encode()).hexdigest()
    (directory / "manifest.json").write_text(text(table))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda table: None, None),
        (lambda table: table.update(format=2), "format 2 is not 1"),
        (
            lambda table: table["files"].update({"../x": table["files"]["state.json"]}),
            "not a plain file name",
        ),
        (lambda table: table["files"].update({"x": {"bytes": "3"}}), "'x' is not one of a file"),
        (lambda table: table.update(files=[]), "not one of a file"),
    ],
)
def test_forged_manifests_are_refused(
    checkpoint: Path, change: Callable[[dict], None], sentence: str | None
) -> None:
    forge(checkpoint, change)
    if sentence is None:
        verify(checkpoint)
        return
    with pytest.raises(CheckpointError, match=sentence):
        verify(checkpoint)


def test_one_file_is_read_without_the_others(checkpoint: Path) -> None:
    flip(checkpoint / "optimizer.safetensors", 800)
    assert torch.equal(read_tensors(checkpoint, "model.safetensors")["w"], torch.arange(12.0).reshape(3, 4))
    assert read_json(checkpoint, "state.json") == {"step": 100, "seed": 7}
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: content does not match"):
        read_tensors(checkpoint, "optimizer.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensors file state\.json"):
        read_tensors(checkpoint, "state.json")


def test_a_directory_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: is not a directory"):
        verify(tmp_path / "nowhere")
