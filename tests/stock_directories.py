"""Tiny model directories as transformers saves them, what may befall them, and how a refusal must look.

The fixtures reach the tests through conftest.py; ``no_test_hangs`` is for files that ask for it.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import CheckpointError, MoesaicError
from moesaic.machine import peak_memory
from moesaic.weights.shards import Shards

CONFIG = "config.json"
SECONDS, MOST_MEMORY, LONGEST_SENTENCE = 2, 200 * 2**20, 2000

T = TypeVar("T")


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny OLMoE: ``whole``, ``sharded``, ``told`` (with a tokenizer), and our ``export`` in shards.

    To be left as they are; the fixtures named after them are copies.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    root = tmp_path_factory.mktemp("stock")
    model.save_pretrained(root / "whole")
    model.save_pretrained(root / "sharded", max_shard_size="8KB")
    assert len(parts(root / "sharded")) > 2
    shutil.copytree(root / "whole", root / "told")
    Tokenizer.char("the old mill\n").save(root / "told" / "tokenizer.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.weights.hf.SHARD_BYTES", 8000)
        moesaic.export_model(root / "told", root / "export")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def whole(stock: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock["whole"], tmp_path / "whole"))


@pytest.fixture
def sharded(stock: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock["sharded"], tmp_path / "sharded"))


@pytest.fixture
def export(stock: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock["export"], tmp_path / "export"))


@pytest.fixture
def no_test_hangs() -> Iterator[None]:
    def late(*_: object) -> None:
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 20)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


def split_file(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the data after it."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_file(file: Path, header: bytes | object, data: bytes = b"", length: int | None = None) -> None:
    """Write a safetensors file; ``length`` is what it says of its header, else the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_all(directory: Path) -> dict[str, Tensor]:
    shards = Shards(directory)
    return {name: shards.read(name) for name in shards.tensors}


def unreadable(directory: Path, sentence: str) -> None:
    """Its safetensors are refused by a sentence that names the directory."""
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read_all(directory)
    assert caught.value.exit_code == 4
    assert str(directory) in str(caught.value)


def unloadable(
    directory: Path, sentence: str, kind: type[MoesaicError] = CheckpointError, exit_code: int = 4
) -> None:
    """``load`` refuses it by a sentence that names the directory; at once, and without taking memory."""
    start, peak = time.process_time(), peak_memory()
    with pytest.raises(MoesaicError, match=sentence) as caught:
        moesaic.load(directory)
    assert time.process_time() - start < SECONDS
    assert peak_memory() - peak < MOST_MEMORY
    assert (type(caught.value), caught.value.exit_code) == (kind, exit_code)
    assert str(directory) in str(caught.value)
    assert len(str(caught.value)) < LONGEST_SENTENCE


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """What ``work`` returns, or nothing and the sentence with which it refuses."""
    try:
        return work(), ""
    except MoesaicError as error:
        return None, str(error)


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


def configure(directory: Path, **changes: Any) -> None:
    edit_json(directory / CONFIG, lambda table: table.update(changes))


def flip(file: Path, bit: int) -> bytes:
    """Flip one bit of a file; returns the bytes that were there."""
    before = file.read_bytes()
    after = bytearray(before)
    after[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(after)
    return before


def exchange(one: Path, two: Path) -> None:
    spare = one.with_name("spare")
    one.rename(spare)
    two.rename(one)
    spare.rename(two)


def link_out(file: Path) -> None:
    if file.exists():
        file.rename(file.parent.parent / "outside")
    file.symlink_to(file.parent.parent / "outside")


def link_to_device(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def cached(directory: Path, root: Path) -> Path:
    """The same directory as huggingface_hub lays it out: large files by SHA-256, others by SHA-1."""
    snapshot, blobs = root / "models--x" / "snapshots" / "a1b2c3", root / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in directory.iterdir():
        kind = hashlib.sha256 if file.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / kind(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot
