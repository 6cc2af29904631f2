"""Experts that stay in the files of their model: the same model, in less memory, and what trains from it."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import command, run_tiny
from torch import Tensor

import moesaic
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import CheckpointError, MoesaicError, RecipeError
from moesaic.offload.bank import OffloadedExperts
from moesaic.train.loop import run
from moesaic.train.rundir import read_rows

transformers = pytest.importorskip("transformers")
TEXT = "the old mill turns\n"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {"num_experts": 6, "num_experts_per_tok": 2}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
    ),
}


def directory(root: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model as transformers saves it, with a tokenizer."""
    name, more = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**{**SMALL, **more}))
    model.to(dtype).save_pretrained(root / family, max_shard_size="20KB")
    Tokenizer.char(TEXT).save(root / family / "tokenizer.json")
    return root / family


BEGUN = """
name = "begun"
data = { source = "files" }
train = { steps = 8, batch_size = 4, seq_len = 16, clip = 1.0, log_every = 1, device = "cpu" }
optim = { lr = 1e-2, weight_decay = 0.1 }
offload = { moments = "fp32" }
eval = { every = 100, sample = 0 }
"""


def ids(tokens: int) -> Tensor:
    return torch.randint(0, 12, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_reads_the_same_with_its_experts_on_disk(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    path = directory(tmp_path, family, dtype)
    whole, streamed = moesaic.load(path), moesaic.load(path, memory=40_000)
    banks = [module.experts for module in streamed.model.moe_modules()]
    assert banks
    assert all(isinstance(bank, OffloadedExperts) for bank in banks)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for tokens in (1, 3, 30):
        torch.testing.assert_close(streamed.logits(ids(tokens)), whole.logits(ids(tokens)), **close)
    one, other = (lm.routing(ids(30)) for lm in (whole, streamed))
    same = [float((a.expert_TK == b.expert_TK).float().mean()) for a, b in zip(one, other, strict=True)]
    assert min(same) > (0.99 if dtype == torch.float32 else 0.9)
    if dtype == torch.float32:
        for lm in (whole, streamed):
            lm.lay_out("packed")
        texts = [lm.generate("the ", 30) for lm in (whole, streamed)]
        assert texts[0] == texts[1]


def test_verbs_leave_experts_on_disk_when_they_are_told_to(tmp_path: Path) -> None:
    path = directory(tmp_path, "olmoe")
    (tmp_path / "held.txt").write_text(TEXT * 20, encoding="utf-8")
    held, said = f"mill={tmp_path / 'held.txt'}", []
    for words in ([], ["offload.memory=30kB"]):
        verbs = (
            ["generate", str(path), *words, "-p", "the ", "-n", "12", "--temperature", "0"],
            ["inspect", str(path), *words, "-p", "the mill", "--json"],
            ["inspect", str(path), *words, "--data", held, "--without", "1", "--json"],
            ["eval", str(path), *words, "--data", held, "--json"],
        )
        answers = [called(*verb) for verb in verbs]
        assert [code for code, _, _ in answers] == [0] * 4, answers
        said.append([out for _, out, _ in answers])
    assert said[0] == said[1]
    code, _, why = called("generate", str(path), "offload.memory=3", "-p", "the")
    assert (code, "hold 0 experts" in why) == (2, True)
    code, _, why = called("eval", "offload.memory=30kB", "--data", held)
    assert (code, "name a model" in why) == (2, True)
    code, _, why = called("generate", str(path), "--temprature", "0", "-p", "the")
    assert (code, "--temprature: is not understood" in why) == (2, True)


def called(*words: str) -> tuple[int, str, str]:
    done = command(*words)
    return done.returncode, done.stdout, done.stderr


def test_what_is_read_in_inference_can_be_read_outside_of_it_and_ends_with_the_model(tmp_path: Path) -> None:
    path = directory(tmp_path, "olmoe")
    lm = moesaic.load(path, memory=40_000)
    wanted = lm.logits(ids(5))
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids(5)).logits_BTV, wanted)
    pool = weakref.ref(lm.model.moe_modules()[0].experts.source.pool)
    del lm
    assert pool() is None


def test_a_run_of_ones_own_is_read_from_its_file_too(tmp_path: Path) -> None:
    ours = run_tiny(tmp_path, "ours")
    whole, streamed = moesaic.load(ours), moesaic.load(ours, memory=10_000)
    torch.testing.assert_close(streamed.logits(ids(12)), whole.logits(ids(12)))


def test_a_run_begins_from_the_experts_of_a_model_and_grows_only_by_what_it_trains(tmp_path: Path) -> None:
    """Started from a directory with its experts on disk, a run is that which has them in memory; it goes on
    after a stop, and is exported with all its experts."""
    path = directory(tmp_path, "olmoe")
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 200, encoding="utf-8")
    recipe = tmp_path / "begun.toml"
    recipe.write_text(BEGUN, encoding="utf-8")
    words = [f"start={path}", f"data.path={text}"]
    memory = run(str(recipe), [*words, f"out={tmp_path / 'memory'}"])
    disk = run(str(recipe), [*words, f"out={tmp_path / 'disk'}", "offload.memory=60kB"])
    ends = [read_rows(one / "metrics.jsonl")[-1]["loss"] for one in (memory, disk)]
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    begun = moesaic.load(path).logits(ids(12))
    found = [moesaic.load(one).logits(ids(12)) for one in (memory, disk)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert float((found[1] - begun).abs().max()) > 0.05
    run(str(disk), ["train.steps=12", "offload.memory=90kB"], resume=True)
    moesaic.export_model(disk, tmp_path / "exported")
    again = moesaic.load(tmp_path / "exported").logits(ids(12))
    torch.testing.assert_close(again, moesaic.load(disk).logits(ids(12)), rtol=1e-4, atol=1e-5)
    saved = (disk / "experts" / "store.json").read_bytes()
    assert json.loads(saved)["weights"] == "fp32"
    shard = path / where(path, "model.layers.1.mlp.experts.2.down_proj.weight")[0]
    kept = shard.read_bytes()  # another training of that model would leave this file of the same length
    head = 8 + int.from_bytes(kept[:8], "little")
    shard.write_bytes(kept[:head] + bytes(byte ^ 1 for byte in kept[head:]))
    with pytest.raises(CheckpointError, match="its experts are others now"):
        moesaic.load(disk)
    shard.write_bytes(kept)
    moesaic.load(disk)
    shard = next(path.glob("model-00001*.safetensors"))
    with shard.open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"model-00001.*bring that file back"):
        moesaic.load(disk)


def test_only_the_router_learns_where_experts_are_frozen(tmp_path: Path) -> None:
    words = ["offload.memory=60kB", "optim.lr=1e-2", "optim.weight_decay=0.5"]
    ours = run_tiny(tmp_path, "ours", *words, 'train.only=["*.mlp.gate.*"]')
    assert (ours / "experts" / "records.bin").stat().st_blocks == 0
    lm = moesaic.load(ours)
    source = lm.model.moe_modules()[0].experts.source
    started = torch.empty(source.shape.parameters)
    source.store.options.origin.fill(source.shape, 0, 1, started)
    first, down = source.gather(0, [1], torch.float32)
    weights = source.layout.weights_of(torch.zeros(1, source.layout.bytes, dtype=torch.uint8))
    stored = started.to(weights.dtype).float()
    assert torch.equal(torch.cat([first.flatten(), down.flatten()]), stored)
    frozen = run_tiny(tmp_path, "frozen", *words, 'train.freeze=["model.layers.*.mlp.experts.*"]')
    assert (frozen / "experts" / "records.bin").stat().st_blocks == 0
    with pytest.raises(RecipeError, match="it learns as a whole or not"):
        run_tiny(tmp_path, "half", *words, 'train.freeze=["*.experts.down_proj"]')


@pytest.mark.parametrize(
    ("family", "words", "message"),
    [
        ("olmoe", {"device": "cuda"}, "CUDA|computed on the CPU|sees none"),
        ("olmoe", {"memory": 4000}, r"hold \d experts of"),
    ],
)
def test_what_cannot_be_streamed_is_said(
    tmp_path: Path, family: str, words: dict[str, Any], message: str
) -> None:
    path = directory(tmp_path, family)
    with pytest.raises(MoesaicError, match=message):
        moesaic.load(path, **{"memory": 40_000, **words})


def where(path: Path, tensor: str) -> tuple[str, int]:
    """The file of a tensor and its first byte there."""
    name = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][tensor]
    with (path / name).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return name, 8 + length + json.loads(file.read(length))[tensor]["data_offsets"][0]


def test_a_damaged_expert_is_named_and_a_dense_model_refused(tmp_path: Path) -> None:
    path = directory(tmp_path, "olmoe")
    name, start = where(path, "model.layers.1.mlp.experts.2.down_proj.weight")
    shard = path / name
    with shard.open("r+b") as file:
        file.seek(start)
        file.write(b"\xff\xff\xff\x7f")
    lm = moesaic.load(path, memory=40_000)
    with pytest.raises(CheckpointError, match="expert 2 of layer 1 holds NaN or infinity"):
        lm.logits(torch.arange(40)[None])
    os.truncate(shard, start + 8)
    fresh = lm.model.moe_modules()[1].experts.source
    fresh.pool.forget()
    with pytest.raises(CheckpointError, match="was cut while it was read"):
        lm.logits(torch.arange(40)[None])
    dense = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SMALL))
    dense.save_pretrained(tmp_path / "dense")
    Tokenizer.char(TEXT).save(tmp_path / "dense" / "tokenizer.json")
    with pytest.raises(RecipeError, match="has no experts to put on disk"):
        moesaic.load(tmp_path / "dense", memory=40_000)
    recipe, text = tmp_path / "begun.toml", tmp_path / "text.txt"
    recipe.write_text(BEGUN, encoding="utf-8")
    text.write_text(TEXT * 200, encoding="utf-8")
    with pytest.raises(RecipeError, match="has no experts to put on disk"):
        run(str(recipe), [f"start={tmp_path / 'dense'}", f"data.path={text}", "offload.memory=60kB"])
