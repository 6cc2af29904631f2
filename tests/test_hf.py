"""Logits of transformers, from its own directories and back: every family, at odd shapes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.errors import CheckpointError  # noqa: E402
from moesaic.generate import SampleOptions, stream  # noqa: E402
from moesaic.lm import LM  # noqa: E402
from moesaic.train.recipe import load_recipe  # noqa: E402
from moesaic.weights import config_json, families  # noqa: E402
from moesaic.weights.hf import tensors_on_disk  # noqa: E402

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
}
# Odd on purpose: head sizes that are not width / heads, one key-value head, experts that are no power of two,
# one expert per token, tied embeddings, layers that are dense by pattern.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe one expert, tied, biases": (
        "olmoe",
        {"num_experts": 5, "num_experts_per_tok": 1, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 10}),
    "mixtral one kv head": (
        "mixtral",
        {
            "num_local_experts": 3,
            "num_experts_per_tok": 3,
            "num_key_value_heads": 1,
            "rope_parameters": LLAMA3,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 14}
        | {"mlp_only_layers": [1], "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe one expert": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "num_key_value_heads": 1},
    ),
    "llama": ("llama", {"mlp_bias": True, "attention_bias": True, "rope_parameters": LLAMA3}),
    "llama head_dim": ("llama", {"head_dim": 20, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 6}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 14, "attention_bias": True}),
    "olmo2": ("olmo2", {"num_key_value_heads": 4}),
    "flex_olmo": ("flex_olmo", {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True}),
}
SPARSE = [name for name, (kind, _) in CASES.items() if families.FAMILIES[kind].sparse]


def build(kind: str, more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **more})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
        else:
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LM]:
    """A stock model with random weights, and ours read from what it saved."""
    theirs = build(*CASES[request.param])
    directory = tmp_path_factory.mktemp("stock")
    theirs.save_pretrained(directory)
    return theirs, moesaic.load(directory)


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(model: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(ids_BT, attention_mask=mask_BT).logits
    return logits_BTV


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5)


def test_logits_are_those_of_transformers(pair: tuple[Any, LM]) -> None:
    theirs, lm = pair
    assert close(lm.logits(ids(2, 24)), their_logits(theirs, ids(2, 24)))


def test_a_padded_batch_gives_their_logits_too(pair: tuple[Any, LM]) -> None:
    theirs, lm = pair
    ids_BT, mask_BT = ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask_BT[1, :5] = 0
    mask_BT[2, :1] = 0
    real_BT = mask_BT.bool()
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids_BT, attention_mask=mask_BT, position_ids=position_BT).logits
    assert close(lm.logits(ids_BT, mask_BT)[real_BT], expected[real_BT])


@torch.no_grad()
def test_cached_steps_give_their_logits_too(pair: tuple[Any, LM]) -> None:
    theirs, lm = pair
    ids_BT = ids(2, 16)
    cache = lm.model.new_cache(2, 16)
    parts = [
        lm.model(part, cache=cache).logits_BTV for part in (ids_BT[:, :7], *ids_BT[:, 7:].split(1, dim=1))
    ]
    assert close(torch.cat(parts, dim=1), their_logits(theirs, ids_BT))


def test_greedy_tokens_are_theirs(pair: tuple[Any, LM]) -> None:
    theirs, lm = pair
    prompt_BT = ids(1, 5)
    told = theirs.generate(prompt_BT, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 5:].tolist()
    assert [int(t) for t in stream(lm.model, prompt_BT, 12, SampleOptions(temperature=0))] == told


def test_an_export_is_byte_for_byte_what_was_read_and_opens_there(
    pair: tuple[Any, LM], tmp_path: Path
) -> None:
    theirs, lm = pair
    moesaic.export_model(lm.path, tmp_path / "out")
    stock = load_file(lm.path / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stock.keys()
    assert all(torch.equal(written[name], stock[name]) for name in stock)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(theirs)
    # Not bit for bit: transformers may choose another kernel for experts in a model that it has loaded.
    assert close(their_logits(again, ids(2, 9)), their_logits(theirs, ids(2, 9)))
    again.save_pretrained(tmp_path / "again")
    back = moesaic.load(tmp_path / "again")
    for (name, ours), (_, read) in zip(
        lm.model.named_parameters(), back.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, read), name
    assert torch.equal(back.logits(ids(2, 9)), lm.logits(ids(2, 9)))


def saved(tmp_path: Path, name: str, **how: Any) -> tuple[Any, Path]:
    theirs = build(*CASES[name])
    theirs.save_pretrained(tmp_path / "stock", **how)
    return theirs, tmp_path / "stock"


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen2_moe"])
def test_shards_and_half_precision_read_as_whole_files_do(name: str, tmp_path: Path) -> None:
    theirs, directory = saved(tmp_path, name, max_shard_size="40KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert close(moesaic.load(directory).logits(ids(1, 9)), their_logits(theirs, ids(1, 9)))
    theirs.bfloat16().save_pretrained(tmp_path / "half")
    half = moesaic.load(tmp_path / "half")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    stock = load_file(tmp_path / "half" / "model.safetensors")
    ours = dict(tensors_on_disk(half.model, families.FAMILIES[name]))
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    assert half.logits(ids(1, 9)).isfinite().all()


@pytest.mark.parametrize("name", SPARSE)
def test_experts_fused_on_disk_are_read_as_those_one_by_one(name: str, tmp_path: Path) -> None:
    theirs, directory = saved(tmp_path, name)
    fused = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del fused["lm_head.weight"]
    assert any(key.endswith("experts.gate_up_proj") for key in fused)
    save_file(fused, directory / "model.safetensors", {"format": "pt"})
    assert close(moesaic.load(directory).logits(ids(1, 9)), their_logits(theirs, ids(1, 9)))


def change(directory: Path, key: str, value: Any) -> None:
    table = json.loads((directory / "config.json").read_text())
    table[key] = value
    (directory / "config.json").write_text(json.dumps(table))


def renormalised(directory: Path) -> None:
    change(directory, "norm_topk_prob", True)


def other_theta(directory: Path) -> None:
    change(directory, "rope_parameters", {"rope_type": "default", "rope_theta": 5e5})


@pytest.mark.parametrize("spoil", [renormalised, other_theta])
def test_a_wrong_setting_would_be_seen(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    theirs, directory = saved(tmp_path, "olmoe")
    assert close(moesaic.load(directory).logits(ids(2, 24)), their_logits(theirs, ids(2, 24)))
    spoil(directory)
    assert not close(moesaic.load(directory).logits(ids(2, 24)), their_logits(theirs, ids(2, 24)))


def test_norms_per_head_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, directory = saved(tmp_path, "olmoe")
    olmoe = families.FAMILIES["olmoe"]
    wrong = families.Family(
        olmoe.model_type,
        olmoe.architecture,
        olmoe.keys,
        {**olmoe.fixed, "attention.qk_norm": "head"},
        olmoe.defaults,
    )
    monkeypatch.setitem(families.FAMILIES, "olmoe", wrong)
    with pytest.raises(CheckpointError, match=r"parameters|q_norm"):
        moesaic.load(directory)
    # Even where the shapes would agree: each head's norm with its part of the weight.
    monkeypatch.undo()
    lm = moesaic.load(directory)
    right = lm.logits(ids(2, 24))
    for layer in lm.model.model.layers:
        attention = layer.self_attn
        for norm in (attention.q_norm, attention.k_norm):
            split(norm, attention.head_dim)
    assert close(right, their_logits(theirs, ids(2, 24)))
    assert not close(lm.logits(ids(2, 24)), their_logits(theirs, ids(2, 24)))


def split(norm: Any, size: int) -> None:
    weight = norm.weight.detach()

    def per_head(x_BTD: torch.Tensor) -> torch.Tensor:
        heads = x_BTD.view(*x_BTD.shape[:-1], -1, size)
        unit = heads * (heads.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        return unit.flatten(-2) * weight

    norm.forward = per_head


def test_old_keys_say_the_same(tmp_path: Path) -> None:
    _, directory = saved(tmp_path, "llama")
    before = moesaic.load(directory).config
    table = json.loads((directory / "config.json").read_text())
    scaling = table.pop("rope_parameters")
    table["rope_theta"] = scaling.pop("rope_theta")
    table["rope_scaling"] = {**scaling, "type": scaling.pop("rope_type")}
    (directory / "config.json").write_text(json.dumps(table))
    assert moesaic.load(directory).config == before


def test_a_sliding_window_ends_the_context_where_it_is_exact(tmp_path: Path) -> None:
    theirs = build("mistral", {"sliding_window": 8, "num_key_value_heads": 1})
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="sliding_window = 8"):
        lm = moesaic.load(tmp_path)
    assert lm.config.context == 8
    assert close(lm.logits(ids(1, 8)), their_logits(theirs, ids(1, 8)))


def test_without_a_tokenizer_ids_work_and_text_says_why_not(tmp_path: Path) -> None:
    _, directory = saved(tmp_path, "olmoe")
    lm = moesaic.load(directory)
    assert [routing.num_experts for routing in lm.routing(ids(1, 4))] == [6, 6, 6]
    with pytest.raises(moesaic.lm.DataError, match=r"no tokenizer\.json"):
        lm.generate("text")
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("recipe", "architecture"),
    [
        ("olmoe-tiny", "OlmoeForCausalLM"),
        ("mixtral-tiny", "MixtralForCausalLM"),
        ("qwen3-moe-tiny", "Qwen3MoeForCausalLM"),
    ],
)
def test_the_tiny_recipes_leave_as_the_shapes_they_are_named_after(recipe: str, architecture: str) -> None:
    config = load_recipe(recipe).model.model_copy(update={"vocab_size": 300})
    family, table = config_json.write_config(config)
    assert family.architecture == architecture
    assert config_json.read_config(table, "config.json")[1].parameters() == config.parameters()
