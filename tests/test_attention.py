"""Attention against its one-head-at-a-time oracle, the mask, RoPE and the key-value cache.

Shape legend: B batch, T positions, S positions with the cache, D width.
"""

from typing import Any, Literal

import pytest
import reference_attention as ref_attention
import torch
from router_oracles import oracle_leaves, randomise
from torch import Tensor

from moesaic.model.attention import (
    Attention,
    AttentionOptions,
    KVCache,
    Rope,
    RopeScaling,
    allowed_keys,
    rope_frequencies,
)

torch.set_num_threads(1)

D, T, EPS = 8, 6, 1e-3
VARIANTS: list[dict[str, Any]] = [
    {"heads": 2},
    {"heads": 4, "kv_heads": 2},
    {"heads": 4, "kv_heads": 1},
    {"heads": 3, "head_dim": 6},
    {"heads": 2, "qkv_bias": True, "out_bias": True},
    {"heads": 2, "qk_norm": "head"},
    {"heads": 4, "kv_heads": 2, "qk_norm": "full", "qkv_bias": True},
    {"heads": 4, "kv_heads": 2, "qk_norm": "head", "head_dim": 4},
    {"heads": 2, "scale": "width"},
    {"heads": 4, "kv_heads": 1, "head_dim": 4, "qk_norm": "full", "scale": "width", "rope_theta": 50.0},
]


def attention(options: AttentionOptions, dropout: float = 0.0) -> Attention:
    made = Attention(options, D, EPS, dropout)
    randomise(made, seed=2)
    return made.double()


def inputs(batch: int = 2, length: int = T) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, D, generator=generator, dtype=torch.float64)


def rope_of(made: Attention, start: int, end: int) -> tuple[Tensor, Tensor]:
    return Rope(made.options, made.head_dim)(torch.arange(start, end)[None])


def oracle(
    made: Attention,
    p: dict[str, Tensor],
    x_TD: Tensor,
    rope: bool,
    qk_norm: Literal["none", "head", "full"] | None = None,
) -> Tensor:
    options = made.options
    qk_norm = qk_norm or options.qk_norm
    y = ref_attention.attention(
        x_TD,
        *(p[f"{name}.weight"] for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        heads=made.num_heads,
        kv_heads=made.num_kv_heads,
        head_dim=made.head_dim,
        qkv_bias=(p["q_proj.bias"], p["k_proj.bias"], p["v_proj.bias"]) if options.qkv_bias else None,
        qk_norm=None if qk_norm == "none" else qk_norm,
        q_norm_w=p.get("q_norm.weight"),
        k_norm_w=p.get("k_norm.weight"),
        eps=EPS,
        rope_theta=options.rope_theta if rope else None,
        scale=D**-0.5 if options.scale == "width" else None,
    )
    return y + p["o_proj.bias"] if options.out_bias else y


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("changed", VARIANTS, ids=str)
def test_attention_equals_the_oracle_in_values_and_gradients(changed: dict[str, Any], rope: bool) -> None:
    made = attention(AttentionOptions(**changed))
    x, exact, p = inputs().requires_grad_(), inputs().requires_grad_(), oracle_leaves(made)
    y = made(x, rope_of(made, 0, T) if rope else None, None)
    expected = torch.stack([oracle(made, p, row, rope) for row in exact])
    close = {"rtol": 1e-5, "atol": 5e-6}  # angles are float32
    torch.testing.assert_close(y, expected, **close)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.autograd.backward([(y * upstream).sum(), (expected * upstream).sum()])
    torch.testing.assert_close(x.grad, exact.grad, **close)
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(parameter.grad, p[name].grad, **close)


@pytest.mark.parametrize(("kind", "other"), [("head", "full"), ("full", "head")])
def test_one_qk_norm_is_not_the_other(kind: Literal["head", "full"], other: Literal["head", "full"]) -> None:
    made = attention(AttentionOptions(heads=2, qk_norm=kind))
    with torch.no_grad():
        made.q_norm.weight.fill_(1.0)
        made.k_norm.weight.fill_(1.0)
    p, x = oracle_leaves(made), inputs()
    y = made(x, None, None)[0]
    torch.testing.assert_close(y, oracle(made, p, x[0], False))
    ones = torch.ones(D if other == "full" else D // 2, dtype=torch.float64)
    swapped = p | {"q_norm.weight": ones, "k_norm.weight": ones}
    assert not torch.allclose(y, oracle(made, swapped, x[0], False, other), atol=1e-3)


def test_attention_is_causal() -> None:
    made = attention(AttentionOptions(heads=4, kv_heads=2))
    x = inputs().requires_grad_()
    y = made(x, rope_of(made, 0, T), None)
    (gradient,) = torch.autograd.grad(y[:, 3].sum(), x)
    assert gradient[:, 4:].abs().max() == 0
    assert gradient[:, :4].abs().amin(-1).min() > 0


@pytest.mark.parametrize("changed", VARIANTS[:7], ids=str)
@pytest.mark.parametrize("steps", [[1] * T, [T], [4, 1, 1], [2, 3, 1], [1, 5]], ids=str)
def test_cached_chunks_equal_one_pass(steps: list[int], changed: dict[str, Any]) -> None:
    made = attention(AttentionOptions(**changed))
    x = inputs()
    cache = KVCache(2, 2, T, made.num_kv_heads, made.head_dim, x.device, x.dtype)
    parts, start = [], 0
    for step in steps:
        end = start + step
        allowed = allowed_keys(step, cache, None, x.device)
        parts.append(made(x[:, start:end], rope_of(made, start, end), allowed, cache, layer=1))
        cache.length = start = end
    expected = made(x, rope_of(made, 0, T), None)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_a_full_cache_says_how_many_positions_it_holds() -> None:
    made = attention(AttentionOptions(heads=2))
    cache = KVCache(1, 2, T - 1, 2, 4, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match="the cache holds 5 positions, 6 are needed"):
        made(inputs(), None, None, cache)


def test_allowed_keys_by_hand() -> None:
    device = torch.device("cpu")
    assert allowed_keys(3, None, None, device) is None
    cache = KVCache(1, 2, 5, 1, 2, device, torch.float32)
    cache.length = 2
    assert allowed_keys(1, cache, None, device) is None
    two = allowed_keys(2, cache, None, device)
    assert two is not None
    assert two.int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 1]]]
    real = torch.tensor([[False, True, True], [True, True, False]])
    padded = allowed_keys(3, None, real, device)
    assert padded is not None
    left, right = padded.int().tolist()
    assert left == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert right == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_rotation_equals_the_oracle_and_keeps_distances_only() -> None:
    made = attention(AttentionOptions(heads=2, rope_theta=30.0))
    x = inputs()
    near = made(x, rope_of(made, 0, T), None)
    far = made(x, rope_of(made, 100, 100 + T), None)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)  # angles are float32
    assert not torch.allclose(near, made(x, None, None), atol=1e-3)
    frequency = rope_frequencies(made.options, 4)
    assert frequency.tolist() == pytest.approx([1.0, 30**-0.5])
    cosine, sine = Rope(made.options, 4)(torch.tensor([[0, 3]]))
    angle = torch.tensor([[0.0] * 2, [3.0, 3 * 30**-0.5]])[None]
    torch.testing.assert_close(cosine, angle.cos())
    torch.testing.assert_close(sine, angle.sin())


@pytest.mark.parametrize(
    ("theta", "size", "scaling"),
    [
        (500_000.0, 128, RopeScaling()),
        (500_000.0, 64, RopeScaling(factor=32.0)),
        (10_000.0, 32, RopeScaling(factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0)),
        (10_000.0, 32, RopeScaling(original_max_position_embeddings=512)),
    ],
    ids=str,
)
def test_llama3_scaling_equals_transformers(theta: float, size: int, scaling: RopeScaling) -> None:
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=2 * size,
        num_attention_heads=2,
        head_dim=size,
        max_position_embeddings=131_072,
        rope_parameters=scaling.model_dump() | {"rope_theta": theta},
    )
    expected, factor = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = rope_frequencies(AttentionOptions(rope_theta=theta, rope_scaling=scaling), size)
    assert factor == 1.0
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    plain = rope_frequencies(AttentionOptions(rope_theta=theta), size)
    assert ours[0] == plain[0]
    assert ours[-1] < plain[-1]


def test_dropout_acts_in_training_only() -> None:
    made = attention(AttentionOptions(heads=2), dropout=0.5)
    x = inputs()
    quiet = made.eval()(x, None, None)
    assert torch.equal(quiet, made(x, None, None))
    noisy = made.train()(x, None, None)
    assert 0.2 < (noisy == 0).double().mean() < 0.8


@pytest.mark.parametrize("changed", VARIANTS, ids=str)
def test_parameter_count_of_options_equals_the_module(changed: dict[str, Any]) -> None:
    options = AttentionOptions(**changed)
    assert options.parameters(D) == sum(p.numel() for p in attention(options).parameters())
