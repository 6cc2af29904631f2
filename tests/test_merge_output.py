"""What a merge leaves on disk: complete, as others read it, and never in the place of something else."""

import errno
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from dense_donors import TEXT, change, dense, merged, options, refused

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.errors import RecipeError, ResourceError  # noqa: E402
from moesaic.merge.merge import merge  # noqa: E402
from moesaic.merge.options import MergeOptions  # noqa: E402
from moesaic.weights.shards import Shards  # noqa: E402


def test_experts_lie_on_disk_one_by_one_and_the_directory_is_complete(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    experts = [change(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    out = merged(tmp_path / "out", base, *experts)
    names = set(Shards(out).tensors)
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight" in names
    assert not any("gate_up_proj" in name for name in names)
    assert {p.name for p in out.iterdir()} >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert moesaic.load(out).config.experts.names == ["a", "b"]
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"] == 1
    assert moesaic.load(out).generate("the old", 3) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_what_is_written(dtype: str, tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    twins = [change(base, tmp_path / name, 0, "no such tensor") for name in "ab"]
    out = merged(tmp_path / "out", base, *twins, dtype=dtype)
    assert {stored.dtype for stored in Shards(out).tensors.values()} == {getattr(torch, dtype)}


def test_an_output_that_exists_stays(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    twins = [change(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    out = merged(tmp_path / "out", base, *twins)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="exists"):
        merged(out, base, *reversed(twins))
    assert (out / "model.safetensors").read_bytes() == before
    merge(options(base, *reversed(twins)), out, lambda _: None, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before


def test_an_output_never_takes_the_place_of_a_donor(tmp_path: Path) -> None:
    base = dense(tmp_path / "m" / "base")
    twins = [change(base, tmp_path / "m" / name, seed) for seed, name in enumerate("ab", 1)]
    for out in (tmp_path / "m", base):
        with pytest.raises(RecipeError, match="base is in there"):
            merge(options(base, *twins), out, lambda _: None, overwrite=True)
    assert (base / "config.json").exists()


def test_a_disk_that_fills_up_leaves_nothing_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense(tmp_path / "base")
    twins = [change(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    out = merged(tmp_path / "out", base, *twins)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    real_write, written = os.write, []

    def write(descriptor: int, data: bytes) -> int:
        written.append(len(data))
        if sum(written) > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(descriptor, data)

    for target, overwrite in ((out, True), (tmp_path / "new", False)):
        written.clear()
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(ResourceError, match=r"needs .* make room"):
            merge(options(base, *reversed(twins)), target, lambda _: None, overwrite=overwrite)
        monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "out"]


def test_what_llama_cpp_needs_of_qwen2(tmp_path: Path) -> None:
    base = dense(tmp_path / "base", "qwen2")
    twins = [change(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    out = merged(tmp_path / "out", base, *twins, renormalize=False, top_k=1)
    assert json.loads((out / "config.json").read_text())["norm_topk_prob"] is False
    gate = Shards(out).read("model.layers.0.mlp.shared_expert_gate.weight")
    assert float(gate.half().abs().min()) > 0  # silu(x) / x has no value at 0
    assert moesaic.export_model(out, tmp_path / "model.gguf", "gguf") == "qwen2moe"
    refused("cannot express", *(dense(tmp_path / f"l{n}") for n in range(3)), renormalize=False)


@pytest.mark.parametrize("init", ["random", "ridge"])
def test_donors_are_read_a_tensor_at_a_time(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = dense(tmp_path / "base")
    twins = [change(base, tmp_path / name, seed) for seed, name in enumerate("abcd", 1)]
    table = options(base, *twins, shared="average", router={"init": init, "seq_len": 32}).model_dump()
    if init == "ridge":
        for name, source in table["experts"].items():
            source["calibration"] = [str(tmp_path / f"{name}.txt")]
            (tmp_path / f"{name}.txt").write_text(TEXT[ord(name) - 97 :] * 3)
    held = most = total = 0
    read = Shards.read

    def watched(self: Shards, name: str) -> torch.Tensor:
        nonlocal held, most, total
        tensor = read(self, name)
        held, total = held + tensor.nbytes, total + tensor.nbytes
        most = max(most, held)
        weakref.finalize(tensor, release, tensor.nbytes)
        return tensor

    def release(size: int) -> None:
        nonlocal held
        held -= size

    monkeypatch.setattr(Shards, "read", watched)
    merge(MergeOptions.model_validate(table), tmp_path / "out", lambda _: None)
    largest = max(stored.bytes for stored in Shards(base).tensors.values())
    assert total > 10 * largest
    assert most < 3 * largest
