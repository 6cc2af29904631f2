"""What a config.json may say: wrong, foreign or contradictory settings end in a sentence that names them."""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_directories import CONFIG, attempt, configure, edit_json, link_out, pipe, unloadable

import moesaic
from moesaic.errors import CheckpointError, RecipeError
from moesaic.weights.config_json import read_config
from moesaic.weights.families import FAMILIES

pytestmark = pytest.mark.usefixtures("no_test_hangs")

IDS = torch.arange(12)[None]


def leave_out(directory: Path, *keys: str) -> None:
    edit_json(directory / CONFIG, lambda table: [table.pop(key) for key in keys])


def settings(stock: dict[str, Path], kind: str, **more: Any) -> dict[str, Any]:
    """A config.json of a family, with all that any family wants."""
    table: dict[str, Any] = json.loads((stock["whole"] / CONFIG).read_text())
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "head_dim": 8}
    return {**table, "model_type": kind, **sizes, **more}


# As a file


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not JSON"),
        (b"[]", "is not a table"),
        (b"null", "is not a table"),
        (b'{"model_type": "olmoe", "model_type": "olmoe"}', "says 'model_type' twice"),
        (b'{"model_type": "olmoe", "rms_norm_eps": NaN}', "holds NaN"),
        (b"{}", "model_type = None"),
    ],
)
def test_a_config_that_is_no_sound_json_is_refused(content: bytes, sentence: str, whole: Path) -> None:
    (whole / CONFIG).write_bytes(content)
    unloadable(whole, rf"config\.json: {sentence}")


@pytest.mark.parametrize("spoil", [link_out, pipe])
@pytest.mark.parametrize("name", [CONFIG, "generation_config.json"])
def test_what_is_no_file_of_the_directory_is_named(
    name: str, spoil: Callable[[Path], None], whole: Path
) -> None:
    spoil(whole / name)
    unloadable(whole, rf"{name}: is (a link out of its directory|not a regular file)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [CONFIG, "generation_config.json"])
def test_a_file_that_may_not_be_read_is_named(name: str, whole: Path) -> None:
    (whole / name).chmod(0)
    unloadable(whole, rf"{name}.*(P|p)ermission")


def test_a_directory_without_a_config_holds_no_model(whole: Path) -> None:
    (whole / CONFIG).unlink()
    unloadable(whole, "holds no moesaic run, no model and no config.json", RecipeError, 2)


def test_what_asks_for_code_is_not_run_and_said(whole: Path, tmp_path: Path) -> None:
    expected = moesaic.load(whole).logits(IDS)
    (whole / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    configure(whole, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, trust_remote_code=True)
    configure(whole, _name_or_path="/etc", _attn_implementation="evil", __class__={"x": 1}, _rest=[None])
    with pytest.warns(UserWarning, match=r"config\.json: auto_map asks for code") as said:
        lm = moesaic.load(whole)
    assert len(said) == 1
    assert torch.equal(lm.logits(IDS), expected)
    assert not (tmp_path / "ran").exists()


def test_underscore_keys_say_nothing(whole: Path) -> None:
    configure(whole, _name_or_path="/etc", _commit_hash=None, _quantization_config={"bits": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moesaic.load(whole)


# Its settings


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
)
def test_a_config_without_a_size_is_refused(key: str, whole: Path) -> None:
    leave_out(whole, key)
    unloadable(whole, rf"config\.json: {key}: missing")
    configure(whole, **{key: None})
    unloadable(whole, rf"config\.json: {key}: missing")


def test_every_size_that_is_missing_is_named(whole: Path) -> None:
    leave_out(whole, "hidden_size", "vocab_size")
    unloadable(whole, r"config\.json: vocab_size, hidden_size: missing")


@pytest.mark.parametrize("value", ["gpt2", "\ud800", None, ["olmoe"]])
def test_another_model_type_is_refused_and_those_known_are_said(value: object, whole: Path) -> None:
    configure(whole, model_type=value)
    unloadable(whole, r"config\.json: model_type = .* is none of olmoe, .*qwen3_moe")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": "abc"}, "hidden_size: should be a whole number"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"hidden_size": 17}, "hidden_size = 17"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 2 is not a multiple"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": 3}, "head"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "perhaps"}, "tie_word_embeddings"),
        ({"attention_bias": 7}, "attention_bias"),
        ({"num_experts": 1}, "num_experts_per_tok = 2 is above"),
        ({"num_experts": 10**15}, "describes .* parameters, which no such file has"),
        ({"num_attention_heads": 10**9, "head_dim": 10**9}, "describes .* parameters"),
        ({"num_experts": 64}, "describes .* parameters, its files hold 5,872"),
        ({"num_local_experts": 4}, "num_experts = 3 contradicts num_local_experts = 4"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: quantised weights"),
        ({"quantization_config": {}}, "quantization_config: quantised weights"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
        ({"hidden_act": None}, "hidden_act = None is not supported"),
        ({"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
        ({"rope_parameters": {**LLAMA3, "factor": "x"}}, "factor"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 9}}, "low_freq_factor"),
        ({"rope_parameters": "default"}, "rope_parameters = 'default' is not a table"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters differ by kind of layer"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
    ],
)
def test_a_setting_that_is_wrong_is_named(changes: dict[str, Any], sentence: str, whole: Path) -> None:
    configure(whole, **changes)
    unloadable(whole, rf"config\.json: .*{sentence}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 39}, r"embed_tokens\.weight is \[40, 16\], and \[39, 16\] by config\.json"),
        ({"num_key_value_heads": 1}, r"k_proj\.weight is \[16, 16\], and \[8, 16\] by config\.json"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ has no place"),
        ({"num_experts": 2}, r"\.mlp\.\S+ (has no place|is \[3, 16\], and \[2, 16\])"),
        ({"attention_bias": True}, r"parameters, its files hold|has no tensor model\.layers\.0\S+bias"),
        ({"model_type": "mixtral"}, r"has no tensor model\.layers\.0\.block_sparse_moe|q_norm"),
    ],
)
def test_a_setting_that_the_weights_contradict_is_refused(
    changes: dict[str, Any], sentence: str, whole: Path
) -> None:
    configure(whole, **changes)
    unloadable(whole, sentence)


NULLABLE = ("rms_norm_eps", "max_position_embeddings", "num_experts", "num_experts_per_tok", "norm_topk_prob")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_null_means_what_a_missing_key_means_or_is_refused(kind: str, stock: dict[str, Path]) -> None:
    table = settings(stock, kind, num_experts=9, qkv_bias=True, mlp_bias=False)
    for key in (*NULLABLE, "tie_word_embeddings", "attention_bias"):
        missing = {name: value for name, value in table.items() if name != key}
        read, said = attempt(lambda: read_config({**table, key: None}, CONFIG))  # noqa: B023  called at once
        assert read == read_config(missing, CONFIG) if read else f"{CONFIG}: " in said and key in said


WRONG: list[Any] = [None, True, "x", "", "\ud800", -1, 0, 1.5, 10**12, 10**4290, -(10**4000), [], [1], {}]


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_wrong_value_of_any_key_ends_in_anything_but_a_sentence(kind: str, stock: dict[str, Path]) -> None:
    table = settings(stock, kind, rope_scaling=None, rope_theta=1e4, partial_rotary_factor=None)
    table |= {
        "use_sliding_window": True,
        "sliding_window": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    escaped: list[str] = []
    for key in table:
        for value in WRONG:
            try:
                read_config({**table, key: value}, CONFIG)
            except Exception as error:
                if type(error) is not CheckpointError or not str(error).startswith(f"{CONFIG}: "):
                    escaped.append(f"{key} = {str(value)[:20]!r}: {type(error).__name__}")
    assert escaped == []


def test_a_long_list_of_dense_layers_takes_no_time(whole: Path) -> None:
    """A config.json may have 64 MiB; this one has a fortieth."""
    configure(whole, model_type="qwen3_moe", moe_intermediate_size=8, num_hidden_layers=1024)
    configure(whole, mlp_only_layers=[-1] * 350_000)
    unloadable(whole, "mlp_only_layers")
