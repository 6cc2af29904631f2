"""Merging: exactness through stock transformers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_donors import TARGETS, change, dense, merged, options, refused
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.config import validate  # noqa: E402
from moesaic.errors import CheckpointError, RecipeError  # noqa: E402
from moesaic.merge.merge import plan_merge  # noqa: E402
from moesaic.merge.options import MergeOptions, merge_options  # noqa: E402
from moesaic.weights.shards import Shards  # noqa: E402

IDS = torch.randint(20, (2, 11), generator=torch.Generator().manual_seed(3))
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@torch.no_grad()
def stock_logits(directory: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("router", ["random", "zero"])
@pytest.mark.parametrize("kind", TARGETS)
def test_copies_of_one_model_are_that_model(kind: str, router: str, tmp_path: Path) -> None:
    base = dense(tmp_path / "base", kind)
    twins = [change(base, tmp_path / name, 0, "no such tensor") for name in ("a", "b", "c")]
    out = merged(tmp_path / "out", base, *twins, router={"init": router})
    assert json.loads((out / "config.json").read_text())["architectures"] == [TARGETS[kind]]
    torch.testing.assert_close(stock_logits(out), stock_logits(base), **CLOSE)
    torch.testing.assert_close(moesaic.load(out).logits(IDS), stock_logits(base), **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in TARGETS if kind != "olmo2"])
def test_a_forced_expert_is_its_dense_model_where_networks_and_their_norms_differ(
    kind: str, tmp_path: Path
) -> None:
    base = dense(tmp_path / "base", kind)
    moved = (".mlp.", "post_attention_layernorm")
    experts = [change(base, tmp_path / name, seed, *moved) for seed, name in enumerate("ab", 1)]
    for number, expert in enumerate(experts):
        # Both experts are one, so that any router forces it; the norm is the base's.
        copy = change(expert, tmp_path / f"{expert.name}-2", 0, "no such tensor")
        out = merged(tmp_path / f"out{number}", base, expert, copy)
        torch.testing.assert_close(stock_logits(out), stock_logits(expert), **CLOSE)


def test_each_token_gets_its_expert(tmp_path: Path) -> None:
    """With every expert chosen and weights of one and zero, the layer is the expert's own."""
    base = dense(tmp_path / "base")
    experts = [change(base, tmp_path / name, seed, ".mlp.") for seed, name in enumerate("ab", 1)]
    lm = moesaic.load(merged(tmp_path / "out", base, *experts, router={"init": "zero"}))
    for number, expert in enumerate(experts):
        for layer in lm.model.moe_modules():
            layer.gate.bias = nn.Parameter(torch.tensor([60.0, 0.0] if number == 0 else [0.0, 60.0]))
        torch.testing.assert_close(lm.logits(IDS), stock_logits(expert), **CLOSE)


def test_a_norm_that_cannot_be_divided_by_is_folded_whole(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][3] = 0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    twins = [change(base, tmp_path / name, 7, "post_attention_layernorm") for name in "ab"]
    out = merged(tmp_path / "out", base, *twins)
    torch.testing.assert_close(stock_logits(out), stock_logits(twins[0]), **CLOSE)
    assert torch.equal(Shards(out).read("model.layers.1.post_attention_layernorm.weight"), torch.ones(24))


@pytest.mark.parametrize("shared", ["base", "average", "expert:b"])
def test_what_is_shared_is_where_it_was_asked_from(shared: str, tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    experts = [change(base, tmp_path / name, seed) for seed, name in enumerate("abc", 1)]
    out = Shards(merged(tmp_path / "out", base, *experts, shared=shared))
    read = {p.name: Shards(p) for p in (base, *experts)}
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.v_proj.weight", "model.norm.weight"):
        mean = torch.stack([read[n].read(name) for n in "abc"]).mean(0)
        expected = {"base": read["base"].read(name), "average": mean, "expert:b": read["b"].read(name)}
        torch.testing.assert_close(out.read(name), expected[shared])


def adapter(directory: Path, base: Path, modules: dict[str, int], **more: Any) -> dict[str, Tensor]:
    """A LoRA adapter of rank 2, and what it adds to each weight."""
    from safetensors.torch import save_file

    directory.mkdir()
    table = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **more}
    (directory / "adapter_config.json").write_text(json.dumps(table))
    tensors, added = {}, {}
    for module, seed in modules.items():
        out, inner = Shards(base).tensors[f"{module}.weight"].shape
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
        tensors |= {
            f"base_model.model.{module}.lora_A.weight": a,
            f"base_model.model.{module}.lora_B.weight": b,
        }
        added[f"{module}.weight"] = 3 * b @ a
    save_file(tensors, directory / "adapter_model.safetensors")
    return added


def test_an_adapter_becomes_a_whole_expert(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    mlp, attention = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"
    added = adapter(tmp_path / "lora", base, {mlp: 1, attention: 2})
    other = change(base, tmp_path / "other", 5)
    plan = plan_merge(options(base, tmp_path / "lora", other))
    assert any("q_proj" in note for note in plan.notes())
    out = Shards(merged(tmp_path / "out", base, tmp_path / "lora", other))
    expected = Shards(base).read(f"{mlp}.weight") + added[f"{mlp}.weight"]
    torch.testing.assert_close(out.read("model.layers.1.block_sparse_moe.experts.0.w2.weight"), expected)
    assert torch.equal(out.read(f"{attention}.weight"), Shards(base).read(f"{attention}.weight"))


def test_a_longer_vocabulary_is_reconciled(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    longer = dense(tmp_path / "longer", vocab_size=40)
    twin = change(base, tmp_path / "twin", 2)
    plan = plan_merge(options(base, longer, twin))
    assert plan.config.vocabulary == Shards(base).tensors["model.embed_tokens.weight"].shape[0]
    assert any("vocabularies" in note for note in plan.notes())
    out = Shards(merged(tmp_path / "out", base, longer, twin, shared="average"))
    rows = plan.config.vocabulary
    words = "model.embed_tokens.weight"
    mean = (Shards(longer).read(words)[:rows] + Shards(twin).read(words)) / 2
    torch.testing.assert_close(out.read(words), mean)
    wide = Shards(merged(tmp_path / "wide", base, longer, twin, shared="expert:longer"))
    assert wide.tensors[words].shape[0] == 40


def test_what_does_not_go_together_is_named(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    twin = change(base, tmp_path / "twin", 1)
    far = {"rope_type": "default", "rope_theta": 50_000.0}
    for name, key, changes in (
        ("wide", "hidden_size = 48, and 24", {"hidden_size": 48}),
        ("deep", "num_hidden_layers = 4, and 3", {"num_hidden_layers": 4}),
        ("fat", "intermediate_size = 44, and 40", {"intermediate_size": 44}),
        ("far", "rope_theta = 50000.0", {"rope_parameters": far}),
        ("untied", "tie_word_embeddings = false, and true", {"tie_word_embeddings": False}),
        ("biased", "attention.qkv_bias = true|attention_bias = true", {"attention_bias": True}),
    ):
        refused(f"{name}: .*({key})", base, twin, dense(tmp_path / name, **changes))
    biased = dense(tmp_path / "biased-base", attention_bias=True)
    refused("MixtralForCausalLM cannot express .*qkv_bias", biased, biased, biased.parent / "biased")
    refused("no such directory", base, twin, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    refused("no config.json", base, twin, tmp_path / "empty")
    moe = merged(tmp_path / "moe", base, twin, change(base, tmp_path / "third", 2))
    refused("mixture of experts already", base, twin, moe)
    odd = change(base, tmp_path / "odd", 3)
    table = json.loads((odd / "tokenizer.json").read_text())
    words = table["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (odd / "tokenizer.json").write_text(json.dumps(table))
    refused("odd: its tokenizer has 'b'", base, twin, odd)
    (twin / "model.safetensors").write_bytes((twin / "model.safetensors").read_bytes()[:-8])
    refused("twin.*truncated", base, twin, odd)


def test_options_are_checked() -> None:
    def said(**table: Any) -> str:
        with pytest.raises(RecipeError) as caught:
            validate(MergeOptions, {"base": "b", **table}, "merge")
        return str(caught.value)

    two = {"a": "x", "b": "y"}
    assert "two or more" in said(experts={"a": "x"})
    assert "no loss can train the router" in said(experts=two, top_k=1)
    assert "above the number" in said(experts=two, top_k=3)
    assert "the experts are a, b" in said(experts=two, shared="expert:c")
    assert "unknown key" in said(experts=two, shard=1)
    with pytest.raises(RecipeError, match="a has no calibration"):
        MergeOptions.model_validate({"base": "b", "experts": two, "router": {"init": "ridge"}}).router_mode()
    for init in ("random", "zero", "auto"):
        table = {"base": "b", "experts": two, "shared": "auto", "router": {"init": init}}
        with pytest.raises(RecipeError, match="shared = auto measures the loss"):
            MergeOptions.model_validate(table).router_mode()
    with pytest.raises(RecipeError, match="write NAME=FILE"):
        merge_options(None, "b", ["a=x", "b=y"], ["c=z"], [])
    with pytest.raises(RecipeError, match="another expert 'x'"):
        merge_options(None, "b", ["q/x", "r/x"], [], [])
    with pytest.raises(RecipeError, match="--base"):
        merge_options(None, None, ["a=x", "b=y"], [], [])


MERGEKIT = """
base_model: BASE
gate_mode: random
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: A
    positive_prompts: ["the old mill", "turns"]
  - source_model: B
    positive_prompts:
      - "1, 2, 3"
    negative_prompts: ["mill"]
"""


def test_a_mergekit_file_is_understood_or_refused_by_key(tmp_path: Path) -> None:
    file = tmp_path / "moe.yml"
    file.write_text(MERGEKIT)
    made = merge_options(file, None, [], [], [])
    assert (made.base, list(made.experts), made.dtype, made.top_k) == ("BASE", ["A", "B"], "bfloat16", 2)
    assert made.experts["B"].negative == ["mill"]
    assert made.router_mode() == "random"
    assert merge_options(file, "other", [], [], ["top_k=2", "router.std=0.5"]).router.std == 0.5
    for text, sentence in (
        ("base_model: B\ngate_mode: cheap_embed", "gate_mode: 'cheap_embed'"),
        ("base_model: B\nmerge_method: linear", "merge_method: moesaic does not know"),
        ("base_model: B\ndtype: int8", "dtype: 'int8'"),
        ("base_model: B\ndtype: [bfloat16]", "dtype: "),
        ("base_model: B\ngate_mode: [hidden]", "gate_mode: "),
        ("base_model: B\narchitecture: qwen", "architecture: moesaic does not know"),
        ("base_model: B\ndtype: 2024-13-45", "not valid YAML"),
        ("base_model: B\nshared_experts: [{source_model: C}]", "only the base itself"),
        ("base_model: B\nexperts: [{source_model: A, residual_scale: 0.5}]", "residual_scale"),
        ("base_model: B\nexperts: [{model: A}]", "needs a source_model"),
        ("base_model: B\nexperts: {", "not valid YAML"),
        ("gate_mode: random", "base_model"),
        ("[1, 2]", "no mergekit-moe file"),
    ):
        file.write_text(text)
        with pytest.raises(RecipeError, match=sentence):
            merge_options(file, None, [], [], [])


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    other = change(base, tmp_path / "other", 5)
    for name, more, sentence in (
        ("dora", {"use_dora": True}, "use_dora"),
        ("ia3", {"peft_type": "IA3"}, "not LORA"),
        ("rank", {"r": "2"}, "not numbers"),
    ):
        adapter(tmp_path / name, base, {"model.layers.1.mlp.down_proj": 1}, **more)
        with pytest.raises(CheckpointError, match=sentence):
            plan_merge(options(base, tmp_path / name, other))


def test_a_head_size_that_is_said_is_one_that_is_not(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    twins = [change(base, tmp_path / name, seed) for seed, name in enumerate("ab", 1)]
    table = json.loads((base / "config.json").read_text())
    table.pop("head_dim", None)
    (base / "config.json").write_text(json.dumps(table))
    for twin in twins:
        (twin / "config.json").write_text(json.dumps({**table, "head_dim": 6}))
    assert plan_merge(options(base, *twins)).config.attention.head_size(24) == 6


def test_an_adapter_that_owns_the_words_ends_texts_as_the_base_does(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    adapter(tmp_path / "lora", base, {"model.layers.1.mlp.down_proj": 1})
    (tmp_path / "lora" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    other = change(base, tmp_path / "other", 5)
    out = merged(tmp_path / "out", base, tmp_path / "lora", other, shared="expert:lora")
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 1


def test_half_an_adapter_and_one_of_another_shape_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = dense(tmp_path / "base")
    other = change(base, tmp_path / "other", 5)
    for name, edit, sentence in (
        ("half", lambda t: t.pop(next(k for k in t if "lora_B" in k)), "only half of its change"),
        ("wide", lambda t: t.update({k: torch.zeros(2, 3) for k in t if "lora_A" in k}), "would fit"),
    ):
        adapter(tmp_path / name, base, {"model.layers.1.mlp.down_proj": 1})
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        edit(tensors)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=sentence):
            plan_merge(options(base, tmp_path / name, other))
    adapter(tmp_path / "pissa", base, {"model.layers.1.mlp.down_proj": 1}, init_lora_weights="pissa_niter_4")
    with pytest.raises(CheckpointError, match="init_lora_weights"):
        plan_merge(options(base, tmp_path / "pissa", other))


def test_a_recipe_and_the_command_line_go_together(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('base = "b"\n[experts]\na = "x"\nb = { model = "y", calibration = "one" }\n')
    made = merge_options(file, None, ["c=z"], ["a=two", "b=three"], [])
    assert [e.calibration for e in made.experts.values()] == [["two"], ["one", "three"], []]
    for text, sentence in (
        ('experts = ["a", "b"]', "should be a table"),
        ('[experts]\na = 3\nb = "y"', "write NAME=FILE"),
        ('[experts]\na = { model = "x", positive = [""] }\nb = "y"', "a prompt is empty"),
    ):
        file.write_text(f'base = "b"\n{text}\n')
        words = ["a=file"] if "NAME" in sentence else []
        with pytest.raises(RecipeError, match=sentence):
            merge_options(file, None, [], words, [])
