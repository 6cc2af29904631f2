"""GGUF files, read back by the library of their format: names, shapes, the order of rotated pairs, refusals.

That llama.cpp says the same tokens is shown by benchmarks/gguf_llama_cpp.py, which needs it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import run_tiny

gguf = pytest.importorskip("gguf")

import moesaic  # noqa: E402
from moesaic.errors import RecipeError  # noqa: E402
from moesaic.lm import LM  # noqa: E402

BPE = ("data.tokenizer=bpe", "data.vocab_size=300", "train.steps=1")


def exported(folder: Path, *words: str, dtype: str = "f32") -> tuple[LM, Any]:
    run = run_tiny(folder, "run", *BPE, *words)
    moesaic.export_model(run, folder / "model.gguf", "gguf", dtype)
    return moesaic.load(run), gguf.GGUFReader(folder / "model.gguf")


def arrays(reader: Any) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: tensor.data for tensor in reader.tensors}


def test_experts_are_stacked_with_gate_and_up_apart(tmp_path: Path) -> None:
    lm, reader = exported(tmp_path, "model.attention.qk_norm=full")
    found = arrays(reader)
    gate, up = lm.model.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach().chunk(2, dim=1)
    assert np.array_equal(found["blk.1.ffn_gate_exps.weight"], gate.numpy())
    assert np.array_equal(found["blk.1.ffn_up_exps.weight"], up.numpy())
    query = lm.model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach()
    assert np.array_equal(
        found["blk.0.attn_q.weight"], query.numpy()
    )  # OLMoE's graph rotates halves, as ours
    assert found["blk.0.attn_q_norm.weight"].shape == (16,)
    assert sum(array.size for array in found.values()) == lm.config.parameters().total


def test_llamas_graph_gets_its_pairs_side_by_side(tmp_path: Path) -> None:
    lm, reader = exported(tmp_path, "model.pattern=D", "model.attention.kv_heads=1", "model.tied=true")
    found = arrays(reader)
    query = lm.model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().numpy()
    rows = [head * 8 + half * 4 + pair for head in range(2) for pair in range(4) for half in range(2)]
    assert np.array_equal(found["blk.0.attn_q.weight"], query[rows])
    assert np.array_equal(found["output.weight"], found["token_embd.weight"])


def test_half_precision_keeps_vectors_and_routers_whole(tmp_path: Path) -> None:
    _, reader = exported(tmp_path, "model.attention.qk_norm=full", dtype="f16")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down_exps.weight"] == kinds["output.weight"] == "F16"
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"


def test_q8_is_within_a_step_of_the_weights(tmp_path: Path) -> None:
    words = ("model.attention.qk_norm=full", "model.width=64", "model.experts.hidden=32")
    lm, reader = exported(tmp_path, *words, dtype="q8_0")
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_down_exps.weight")
    back = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    exact = lm.model.get_parameter("model.layers.0.mlp.experts.down_proj").detach().numpy()
    assert np.abs(back - exact).max() < np.abs(exact).max() / 127
    assert not np.array_equal(back, exact)


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    lm, reader = exported(tmp_path, "model.attention.qk_norm=full")
    field = reader.fields["tokenizer.ggml.tokens"]
    tokens = [bytes(field.parts[i]).decode() for i in field.data]
    vocabulary = lm.tokenizer.library.get_vocab(with_added_tokens=True)
    assert {token: i for i, token in enumerate(tokens)} == vocabulary
    assert int(reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == lm.tokenizer.eos_id


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.attention.qk_norm=full", "model.attention.kv_heads=1"], "as many key-value heads"),
        (["model.attention.qk_norm=full", "model.router.renormalize=true"], "never renormalises"),
        (["model.attention.qk_norm=head"], "always renormalises"),
        (
            ["model.attention.qk_norm=head", "model.router.renormalize=true", "model.pattern=DM"],
            "no dense layers",
        ),
        (
            [
                "model.attention.qk_norm=full",
                "model.attention.qkv_bias=true",
                "model.attention.out_bias=true",
            ],
            "bias",
        ),
        (["model.conv=4"], r"model\.conv"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    words: list[str], reason: str, tmp_path: Path
) -> None:
    run = run_tiny(tmp_path, "run", *BPE, *words)
    with pytest.raises(RecipeError, match=reason):
        moesaic.export_model(run, tmp_path / "model.gguf", "gguf")
    assert [path for path in tmp_path.iterdir() if "gguf" in path.name] == []


def test_characters_beyond_ascii_are_refused(tmp_path: Path) -> None:
    run_tiny(tmp_path, "first", "train.steps=1")
    (tmp_path / "text.txt").write_text("die alte Mühle am Fluß " * 300, encoding="utf-8")
    run = run_tiny(tmp_path, "run", "train.steps=1", "model.attention.qk_norm=full")
    with pytest.raises(RecipeError, match="beyond ASCII"):
        moesaic.export_model(run, tmp_path / "model.gguf", "gguf")


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_tiny(tmp_path, "run", *BPE, "model.attention.qk_norm=full")

    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(moesaic.errors.ResourceError, match="free"):
        moesaic.export_model(run, tmp_path / "model.gguf", "gguf")
    assert [path for path in tmp_path.iterdir() if "gguf" in path.name] == []
