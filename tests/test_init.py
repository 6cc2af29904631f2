"""Initial weights, by the name of the parameter."""

import math
from typing import Any

import pytest
import torch
from router_oracles import router_options
from torch import Tensor

from moesaic.model.attention import AttentionOptions
from moesaic.model.config import InitOptions, ModelConfig
from moesaic.model.experts import ExpertOptions, FFNOptions
from moesaic.model.transformer import LanguageModel

torch.set_num_threads(1)

WIDTH, HIDDEN, VOCABULARY, CONTEXT = 96, 160, 210, 80


def model(kind: str, zero_output: bool = False, std: float = 0.02, **changed: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(
        ModelConfig(
            **{
                "layers": 2,
                "pattern": "MD",
                "width": WIDTH,
                "vocab_size": VOCABULARY,
                "context": CONTEXT,
                "position": "learned",
                "norm": "layer",
                "head_bias": True,
                "attention": AttentionOptions(heads=4, qkv_bias=True, out_bias=True, qk_norm="head"),
                "ffn": FFNOptions(kind="relu", hidden=HIDDEN, bias=True),
                "experts": ExpertOptions(count=6, hidden=HIDDEN, bias=True, shared_hidden=HIDDEN),
                "router": router_options("noisy_top_k", 2, True),
                "init": InitOptions(kind=kind, zero_output=zero_output, std=std),
            }
            | changed
        )
    )


def parameters(kind: str, **changed: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model(kind, **changed).named_parameters()}


def is_bias(name: str) -> bool:
    return name.endswith("bias")


def matrices(made: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p for name, p in made.items() if p.ndim > 1 and not is_bias(name)}


def expected_std(kind: str, name: str, weight: Tensor, std: float) -> float:
    fan_out, fan_in = weight.shape[-2:]
    if kind == "normal":
        return std
    if kind == "trunc_normal":  # cut at three deviations, which takes 1.3 % off the deviation
        density = math.exp(-4.5) / math.sqrt(2 * math.pi)
        return std * math.sqrt(1 - 6 * density / math.erf(3 / math.sqrt(2)))
    if "embed_" in name:
        return 1.0
    return math.sqrt(2 / fan_in) if kind == "kaiming" else math.sqrt(2 / (fan_in + fan_out))


@pytest.mark.parametrize("kind", ["kaiming", "xavier", "normal", "trunc_normal"])
def test_every_matrix_has_the_deviation_of_its_kind(kind: str) -> None:
    made = matrices(parameters(kind, std=0.05))
    assert len(made) > 15
    for name, weight in made.items():
        expected = expected_std(kind, name, weight, 0.05)
        noise = 4.5 / math.sqrt(2 * weight.numel())  # four and a half deviations of the estimate
        assert weight.std().item() == pytest.approx(expected, rel=noise), name
        assert abs(weight.mean().item()) < 4.5 * expected / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("kind", ["kaiming", "xavier"])
def test_each_expert_of_a_stack_is_initialised_as_a_matrix_of_its_own(kind: str) -> None:
    made = parameters(kind)
    for name in ("gate_up_proj", "down_proj"):
        stack = made[f"model.layers.0.mlp.experts.{name}"]
        for weight in stack:
            expected = expected_std(kind, name, weight, 0.0)
            assert weight.std().item() == pytest.approx(expected, rel=4.5 / math.sqrt(2 * weight.numel()))
        assert not torch.equal(stack[0], stack[1])


def test_trunc_normal_stays_within_three_deviations_and_reaches_beyond_two() -> None:
    for name, weight in matrices(parameters("trunc_normal", std=0.05)).items():
        assert weight.abs().max() <= 3 * 0.05, name
        assert weight.abs().max() > 2 * 0.05, name
    assert max(w.abs().max() for w in matrices(parameters("normal", std=0.05)).values()) > 3 * 0.05


@pytest.mark.parametrize("kind", ["kaiming", "xavier"])
def test_biases_are_uniform_within_the_root_of_their_fan_in(kind: str) -> None:
    made = parameters(kind)
    biases = {name: b for name, b in made.items() if is_bias(name) and "norm" not in name}
    assert len(biases) == 18
    for name, bias in biases.items():
        inner = name.endswith(("down_proj.bias", "down_bias"))
        bound = 1 / math.sqrt(HIDDEN if inner else WIDTH)
        assert bias.abs().max() <= bound, name
        assert bias.abs().max() > 0.5 * bound, name


@pytest.mark.parametrize("kind", ["kaiming", "xavier"])
def test_the_bias_of_a_tied_head_is_initialised_like_that_of_a_free_one(kind: str) -> None:
    bias = parameters(kind, tied=True)["lm_head.bias"]
    assert 0.5 / math.sqrt(WIDTH) < bias.abs().max() <= 1 / math.sqrt(WIDTH)


@pytest.mark.parametrize("kind", ["normal", "trunc_normal"])
def test_biases_are_zero_for_normal_weights(kind: str) -> None:
    made = parameters(kind)
    assert all(b.abs().max() == 0 for name, b in made.items() if is_bias(name))


@pytest.mark.parametrize("kind", ["kaiming", "xavier", "normal", "trunc_normal"])
def test_norms_start_at_one_and_their_biases_at_zero(kind: str) -> None:
    made = parameters(kind)
    norms = {name: p for name, p in made.items() if "norm" in name}
    assert len(norms) == 14
    for name, p in norms.items():
        assert (p == (0.0 if is_bias(name) else 1.0)).all(), name


def test_temperature_starts_at_one() -> None:
    made = parameters("normal", router=router_options("smart", 2))
    assert made["model.layers.0.mlp.gate.log_temperature"] == 0


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["kaiming", "xavier", "normal", "trunc_normal"])
def test_zero_output_makes_every_block_the_identity(kind: str, biased: bool) -> None:
    made = model(
        kind,
        zero_output=True,
        attention=AttentionOptions(heads=4, qkv_bias=biased, out_bias=biased),
        ffn=FFNOptions(kind="relu", hidden=HIDDEN, bias=biased),
        experts=ExpertOptions(count=6, hidden=HIDDEN, bias=biased, shared_hidden=HIDDEN),
    ).eval()
    x = torch.randn(1, 5, WIDTH)
    for block in made.model.layers:
        assert torch.equal(block(x, None, None, None, None)[0], x)
    assert made.lm_head.weight.abs().max() > 0


def test_the_seed_decides() -> None:
    first, again = parameters("trunc_normal"), parameters("trunc_normal")
    assert all(torch.equal(p, again[name]) for name, p in first.items())


def test_a_model_on_the_meta_device_is_left_alone() -> None:
    with torch.device("meta"):
        made = model("normal")
    assert {p.device.type for p in made.parameters()} == {"meta"}
