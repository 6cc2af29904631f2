"""What a model description counts: parameters, active parameters, operations.

Each count is compared with the model that the description builds.
"""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from router_oracles import router_options
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moesaic.model.attention import AttentionOptions, RopeScaling
from moesaic.model.config import InitOptions, ModelConfig
from moesaic.model.experts import ExpertOptions, FFNOptions
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import LanguageModel

torch.set_num_threads(1)


def config(**changed: Any) -> ModelConfig:
    small: dict[str, Any] = {
        "layers": 3,
        "width": 16,
        "vocab_size": 19,
        "context": 8,
        "attention": AttentionOptions(heads=2),
        "ffn": FFNOptions(hidden=24),
        "experts": ExpertOptions(count=4, hidden=12),
        "router": router_options("top_k", 2),
        "init": InitOptions(),
    }
    return ModelConfig(**small | changed)


GRID: list[dict[str, Any]] = [
    *({"router": router_options(kind, 2, bias)} for kind in ROUTERS for bias in (False, True)),
    *(
        {
            "experts": ExpertOptions(
                kind=kind, count=5, hidden=12, bias=bias, shared_hidden=6, shared_gate=bias
            )
        }
        for kind in ("swiglu", "relu", "gelu", "relu2")
        for bias in (False, True)
    ),
    *(
        {"ffn": FFNOptions(kind=k, hidden=24, bias=b), "pattern": "MD"}
        for k in ("swiglu", "relu")
        for b in (False, True)
    ),
    {"tied": True},
    {"tied": True, "head_bias": True},
    {"head_bias": True},
    {"position": "learned"},
    {"position": "learned", "norm": "layer", "tied": True},
    {"norm": "layer", "pattern": "DM"},
    {"pattern": "D"},
    {"pattern": "MDD"},
    {"conv": 4},
    {"attention": AttentionOptions(heads=4, kv_heads=2, qk_norm="head")},
    {"attention": AttentionOptions(heads=4, kv_heads=1, qk_norm="full", head_dim=6)},
    {"attention": AttentionOptions(heads=2, qkv_bias=True, out_bias=True)},
    {"experts": ExpertOptions(count=2, hidden=12)},
]


@pytest.mark.parametrize("changed", GRID, ids=str)
def test_parameters_equal_those_of_the_built_model(changed: dict[str, Any]) -> None:
    made = config(**changed)
    model = LanguageModel(made)
    total = sum(p.numel() for p in model.parameters())
    assert made.parameters().total == total
    sparse = model.moe_modules()
    assert len(sparse) == len(made.moe_layers)
    idle = 0
    for layer in sparse:
        of_all_experts = sum(p.numel() for p in layer.experts.parameters())
        idle += of_all_experts * (made.experts.count - made.router.top_k) // made.experts.count
    assert made.parameters().active == total - idle


@pytest.mark.parametrize("changed", GRID, ids=str)
def test_flops_equal_those_counted_in_a_forward_pass(changed: dict[str, Any]) -> None:
    made = config(**changed)
    if made.router.kind == "smart":
        router = router_options("smart", 2, made.router.bias, mass=1.0)  # as many experts as allowed
        made = config(**changed | {"router": router})
    model = LanguageModel(made).train()  # noise of a router is computed in training only
    ids_BT = torch.randint(19, (4, 8))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids_BT)
    assert made.flops_per_token(8) * ids_BT.numel() == counter.get_total_flops()


def test_options_that_would_do_nothing_or_divide_by_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="shared_gate"):
        ExpertOptions(shared_gate=True)
    with pytest.raises(ValidationError, match="rope_scaling needs position"):
        config(position="learned", attention=AttentionOptions(heads=2, rope_scaling=RopeScaling()))
    with pytest.raises(ValidationError, match="must be above"):
        RopeScaling(low_freq_factor=4, high_freq_factor=4)


def test_counting_needs_no_memory() -> None:
    huge = config(layers=64, width=8192, vocab_size=10**6, experts=ExpertOptions(count=512, hidden=4096))
    assert huge.parameters().total > 10**12
    assert huge.parameters().active < huge.parameters().total / 50


@pytest.mark.parametrize(
    ("pattern", "layers", "sparse"),
    [("M", 3, [0, 1, 2]), ("D", 3, []), ("MD", 5, [0, 2, 4]), ("DM", 3, [1]), ("DDM", 6, [2, 5])],
)
def test_pattern_repeats_over_the_layers(pattern: str, layers: int, sparse: list[int]) -> None:
    made = config(pattern=pattern, layers=layers)
    assert made.moe_layers == sparse
    assert [made.is_moe(layer) for layer in range(layers)] == [layer in sparse for layer in range(layers)]


@pytest.mark.parametrize("shared_hidden", [0, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_twin_is_as_large_as_the_active_part(bias: bool, shared_hidden: int) -> None:
    experts = ExpertOptions(count=4, hidden=12, bias=bias, shared_hidden=shared_hidden)
    sparse = config(experts=experts)
    twin = sparse.dense_twin()
    assert twin.moe_layers == []
    assert twin.ffn.hidden == 2 * 12 + shared_hidden
    assert twin.parameters().active == twin.parameters().total
    model = LanguageModel(twin)
    assert sum(p.numel() for p in model.parameters()) == twin.parameters().total
    router = sparse.router.parameters(16, 4)
    networks = 2 + (1 if shared_hidden else 0)  # the twin's one network has one output bias
    extra = 3 * (router + ((networks - 1) * 16 if bias else 0))
    assert sparse.parameters().active == twin.parameters().total + extra


def test_a_tied_model_says_so_in_its_flops_not() -> None:
    assert config(tied=True).flops_per_token(8) == config().flops_per_token(8)
    assert config(tied=True).parameters().total == config().parameters().total - 19 * 16


def test_vocabulary_is_left_to_the_tokenizer_until_it_is_needed() -> None:
    with pytest.raises(ValueError, match="it comes from the tokenizer"):
        config(vocab_size=None).parameters()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 130, "attention": AttentionOptions(heads=8)}, "width = 130 does not divide"),
        ({"attention": AttentionOptions(heads=4, kv_heads=3)}, "not a multiple of attention.kv_heads = 3"),
        ({"attention": AttentionOptions(heads=2, head_dim=5)}, "RoPE needs an even head size, not 5"),
        ({"router": router_options("top_k", 5)}, "router.top_k = 5 is above experts.count = 4"),
        ({"pattern": "MDMD"}, "pattern = 'MDMD' is longer than layers = 3"),
        ({"pattern": "MX"}, "pattern"),
        ({"pattern": ""}, "pattern"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changed)


def test_what_a_dense_or_learned_model_does_not_use_is_not_checked() -> None:
    config(pattern="D", router=router_options("top_k", 5))
    config(position="learned", attention=AttentionOptions(heads=2, head_dim=5))


def test_the_kind_of_router_defaults_to_top_k() -> None:
    assert config(router={"top_k": 1, "renormalize": True}).router == router_options(
        "top_k", 1, renormalize=True
    )


def test_parts_make_the_whole_and_keys_are_not_taken_of_a_prime() -> None:
    options: dict[str, Any] = {"kind": "smart", "keys": "product"}
    config = ModelConfig(vocab_size=100, experts={"count": 12, "hidden": 8}, router=options)
    assert sum(config.parts().values()) == config.parameters().total
    assert {"embeddings", "attention", "norms", "experts", "routers"} <= set(config.parts())
    with pytest.raises(ValueError, match=r"experts\.count = 4099 is prime.*4096 is 64"):
        ModelConfig(vocab_size=100, experts={"count": 4099}, router=options)
