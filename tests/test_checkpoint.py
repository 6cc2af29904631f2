"""Checkpoints come back exactly, are pruned with care and are found again."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from moesaic.errors import CheckpointError
from moesaic.weights.checkpoint import (
    CheckpointOptions,
    newest_valid,
    read_checkpoint,
    save,
    step_of,
    write_checkpoint,
)
from moesaic.weights.contents import DTYPES, Contents


def simple(value: int) -> Contents:
    return Contents(
        tensors={"model.safetensors": {"w": torch.full((4,), float(value))}},
        json={"state.json": {"value": value}},
        files={"tokenizer.json": b"{}"},
    )


def value_in(path: Path) -> int:
    """The value of ``simple`` in all three places, or a failed assertion."""
    contents = read_checkpoint(path)
    value = contents.json["state.json"]["value"]
    assert torch.equal(contents.tensors["model.safetensors"]["w"], torch.full((4,), float(value)))
    assert contents.files == {"tokenizer.json": b"{}"}
    return value


def unspoken(sentence: str) -> None:
    raise AssertionError(sentence)


def listing(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def damage(run: Path, step: int) -> None:
    path = run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_round_trip_is_exact(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 256, (64,), generator=generator, dtype=torch.uint8)
    shared = torch.arange(6.0)
    tensors = {str(dtype): bits.view(dtype) for dtype in DTYPES if dtype != torch.bool}
    tensors |= {
        "bool": bits > 127,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor([float("nan"), float("-inf"), -0.0])),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1).expand(5),
        "tied": shared,
        "tied_too": shared,
        "slice": shared[2:4],
        'a "name" é\n': torch.zeros(1),
    }
    state = {
        "step": 3,
        "float": 0.1 + 0.2,
        "big": 2**70,
        "text": "é\u2028",
        "none": None,
        "list": [1, [True]],
    }
    contents = Contents(
        tensors={"model.safetensors": tensors, "none.safetensors": {}},
        json={"state.json": state, "list.json": [1]},
        files={"tokenizer.json": b"\0not json", "empty": b""},
    )
    write_checkpoint(tmp_path / "some" / "where", contents)
    read = read_checkpoint(tmp_path / "some" / "where")
    assert (read.json, read.files) == (contents.json, contents.files)
    assert read.tensors["none.safetensors"] == {}
    assert read.tensors["model.safetensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        back = read.tensors["model.safetensors"][name]
        assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape), name
        flat = tensor.detach().contiguous().flatten().view(torch.uint8)
        assert torch.equal(back.flatten().view(torch.uint8), flat), name


def test_files_larger_than_a_block_survive(tmp_path: Path) -> None:
    tensor = torch.arange(3 * 2**20, dtype=torch.int64)[1:]
    write_checkpoint(tmp_path / "big", Contents(tensors={"a.safetensors": {"x": tensor}}))
    back = read_checkpoint(tmp_path / "big").tensors["a.safetensors"]["x"]
    assert torch.equal(back, tensor)
    back.zero_()  # a private map: the checkpoint must not change with it
    assert torch.equal(read_checkpoint(tmp_path / "big").tensors["a.safetensors"]["x"], tensor)


@pytest.mark.parametrize(
    "contents",
    [
        Contents(files={"../x": b""}),
        Contents(files={".hidden": b""}),
        Contents(files={"manifest.json": b""}),
        Contents(files={"": b""}),
        Contents(tensors={"model.bin": {}}),
        Contents(json={"state.json": {"x": float("nan")}}),
        Contents(json={"state.json": 1}, files={"state.json": b""}),
        Contents(tensors={"m.safetensors": {"x": torch.zeros(2, 2).to_sparse()}}),
        Contents(tensors={"m.safetensors": {"x": torch.zeros(2, device="meta")}}),
        Contents(tensors={"m.safetensors": {"x": torch.zeros(2, dtype=torch.complex64)}}),
        Contents(tensors={"m.safetensors": {"__metadata__": torch.zeros(2)}}),
    ],
)
def test_contents_that_cannot_be_stored_leave_nothing(tmp_path: Path, contents: Contents) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  the sentence differs
        write_checkpoint(tmp_path / "step", contents)
    assert os.listdir(tmp_path) == []


def test_options_keep_at_least_two(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        CheckpointOptions(keep=1)
    with pytest.raises(ValueError, match="at least 2"):
        save(tmp_path, 1, simple(1), keep=1)


def test_save_points_latest_and_prunes(tmp_path: Path) -> None:
    for step in (0, 100, 200, 300):
        path = save(tmp_path, step, simple(step), keep=2)
        assert (tmp_path / "latest").read_text() == f"{path.name}\n"
    assert listing(tmp_path) == ["step-00000200", "step-00000300"]
    assert newest_valid(tmp_path, unspoken) == path
    assert step_of(path) == 300


def test_prune_counts_only_whole_ones(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, simple(step), keep=3)
    damage(tmp_path, 300)
    save(tmp_path, 400, simple(400), keep=2)
    assert listing(tmp_path) == ["step-00000200", "step-00000300", "step-00000400"]
    damage(tmp_path, 200)
    save(tmp_path, 500, simple(500), keep=2)
    assert listing(tmp_path) == ["step-00000400", "step-00000500"]


def test_prune_never_removes_the_one_just_written(tmp_path: Path) -> None:
    for step in (500, 600, 700, 100):
        save(tmp_path, step, simple(step), keep=2)
    assert listing(tmp_path) == ["step-00000100", "step-00000700"]


def test_a_damaged_newest_falls_back_with_a_sentence(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, simple(step), keep=3)
    damage(tmp_path, 300)
    (tmp_path / "checkpoints" / "step-00000200" / "state.json").unlink()
    said: list[str] = []
    path = newest_valid(tmp_path, said.append)
    assert path is not None
    assert value_in(path) == 100
    assert len(said) == 2
    assert said[0].startswith("checkpoint step-00000300 is damaged (")
    assert "model.safetensors: content does not match" in said[0]
    assert "state.json: is missing" in said[1]
    assert all(sentence.endswith("falling back to step-00000100") for sentence in said)
    damage(tmp_path, 100)
    with pytest.raises(CheckpointError, match=r"none of its 3 checkpoint\(s\) is whole"):
        newest_valid(tmp_path, said.append)


def test_foreign_things_are_not_checkpoints(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "nowhere", unspoken) is None
    place = tmp_path / "checkpoints"
    place.mkdir()
    assert newest_valid(tmp_path, unspoken) is None
    save(tmp_path, 100, simple(100), keep=2)
    (tmp_path / "latest").write_bytes(b"\xff/../etc")
    (place / "step-00000900").write_text("a file")
    (place / "step-900").mkdir()
    (place / "notes").mkdir()
    shutil.copytree(place / "step-00000100", place / f".step-00000950.tmp-{dead_pid()}")
    os.symlink(place / "step-00000100", place / "step-00000800")
    path = newest_valid(tmp_path, unspoken)
    assert path is not None
    assert path.name == "step-00000100"
    (tmp_path / "latest").unlink()
    assert newest_valid(tmp_path, unspoken) == path


def test_only_temporaries_of_the_dead_and_our_own_are_removed(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    alive = f".step-00000050.tmp-{os.getppid()}"
    for name in (alive, f".step-00000050.tmp-{dead_pid()}", f".step-00000050.tmp-{os.getpid()}", ".x.tmp-1"):
        (place / name).mkdir(parents=True)
        (place / name / "model.safetensors").write_text("half")
    save(tmp_path, 100, simple(100), keep=2)
    assert listing(tmp_path) == sorted([alive, ".x.tmp-1", "step-00000100"])


@pytest.mark.parametrize("final", ["absent", "damaged", "whole"])
def test_a_checkpoint_that_stepped_aside_is_found_and_put_back(tmp_path: Path, final: str) -> None:
    place = tmp_path / "checkpoints"
    save(tmp_path, 100, simple(1), keep=2)
    shutil.copytree(place / "step-00000100", place / f".step-00000100.old-{dead_pid()}")
    if final == "absent":
        shutil.rmtree(place / "step-00000100")
    elif final == "damaged":
        damage(tmp_path, 100)
    else:
        shutil.rmtree(place / "step-00000100")
        write_checkpoint(place / "spare", simple(2))
        os.rename(place / "spare", place / "step-00000100")
    said: list[str] = []
    path = newest_valid(tmp_path, said.append)
    assert path is not None
    assert step_of(path) == 100
    assert value_in(path) == (2 if final == "whole" else 1)
    assert len(said) == (final == "damaged")
    save(tmp_path, 200, simple(200), keep=2)
    assert listing(tmp_path) == ["step-00000100", "step-00000200"]
    assert value_in(place / "step-00000100") == (2 if final == "whole" else 1)
