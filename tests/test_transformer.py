"""The whole model: padding, causality, the cache, and equality with a plain makeMoE.

Shape legend: B batch, T positions.
"""

from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.functional as F
from router_oracles import randomise, router_options
from torch import Tensor

from moesaic.model.attention import AttentionOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import ExpertOptions, FFNOptions
from moesaic.model.routers import ROUTERS
from moesaic.model.transformer import LanguageModel

torch.set_num_threads(1)

VOCABULARY, CONTEXT = 23, 10
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"router": router_options(kind, 2, True)} for kind in ROUTERS},
    "learned": {"position": "learned", "norm": "layer"},
    "grouped": {"attention": AttentionOptions(heads=4, kv_heads=1)},
    "head norm": {"attention": AttentionOptions(heads=2, kv_heads=1, qk_norm="head")},
    "full norm": {"attention": AttentionOptions(heads=2, qk_norm="full", qkv_bias=True), "tied": True},
    "mixed": {"pattern": "MD", "position": "learned", "head_bias": True},
    "dense": {"pattern": "D"},
    "convolved": {"conv": 3},
    "convolved with longer reach than a prompt": {"conv": 6, "position": "learned"},
}


def model(**changed: Any) -> LanguageModel:
    options: dict[str, Any] = {
        "layers": 2,
        "width": 16,
        "vocab_size": VOCABULARY,
        "context": CONTEXT,
        "attention": AttentionOptions(heads=2),
        "ffn": FFNOptions(hidden=20),
        "experts": ExpertOptions(count=4, hidden=12, shared_hidden=4, shared_gate=True),
    }
    torch.manual_seed(0)
    made = LanguageModel(ModelConfig(**options | changed))
    randomise(made, seed=1, scale=0.4)
    return made.eval()


def ids(batch: int = 3, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(4))


def logits_of(made: LanguageModel, *arguments: Any) -> Tensor:
    with torch.no_grad():
        logits_BTV = made(*arguments).logits_BTV
    assert logits_BTV is not None
    return logits_BTV


@pytest.mark.parametrize("steps", [[1] * CONTEXT, [4, 6], [6, 1, 3], [CONTEXT]], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_full_forward(name: str, steps: list[int]) -> None:
    made, ids_BT = model(**VARIANTS[name]), ids()
    cache = made.new_cache(3, CONTEXT)
    parts = [logits_of(made, part, None, cache) for part in ids_BT.split(steps, dim=1)]
    assert cache.length == CONTEXT
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(made, ids_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VARIANTS)
def test_padded_batch_gives_each_row_its_own_logits(name: str, side: str) -> None:
    made, ids_BT, lengths = model(**VARIANTS[name]), ids(), [CONTEXT, 3, 7]
    place = torch.arange(CONTEXT)
    length_B1 = torch.tensor(lengths)[:, None]
    real_BT = place >= CONTEXT - length_B1 if side == "left" else place < length_B1
    padded = logits_of(made, ids_BT, real_BT)
    for row, real, one in zip(ids_BT, real_BT, padded, strict=True):
        alone = logits_of(made, row[real][None])[0]
        torch.testing.assert_close(one[real], alone, rtol=1e-5, atol=1e-5)
    assert padded.isfinite().all()
    with torch.no_grad():
        for routing in made(ids_BT, real_BT).routings:
            assert routing.real_tokens() == sum(lengths)


@pytest.mark.parametrize("name", VARIANTS)
def test_left_padded_batch_continues_from_the_cache(name: str) -> None:
    made, ids_BT = model(**VARIANTS[name]), ids()
    real_BT = torch.arange(CONTEXT) >= CONTEXT - 3 - torch.tensor([CONTEXT - 3, 1, 4])[:, None]
    cache = made.new_cache(3, CONTEXT)
    head, *tail = (7, 2, 1)
    parts = [logits_of(made, ids_BT[:, :head], real_BT[:, :head], cache)]
    for part in ids_BT[:, head:].split(tail, dim=1):  # new tokens are all real and need no mask
        parts.append(logits_of(made, part, None, cache))
    whole = logits_of(made, ids_BT, real_BT)
    torch.testing.assert_close(torch.cat(parts, dim=1)[real_BT], whole[real_BT], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_later_token_never_changes_an_earlier_logit(name: str) -> None:
    made, ids_BT = model(**VARIANTS[name]), ids()
    changed = ids_BT.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % VOCABULARY
    before, after = logits_of(made, ids_BT), logits_of(made, changed)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[:, 6:], before[:, 6:], atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_shares_its_storage_and_both_gradients(tied: bool) -> None:
    made = model(tied=tied)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) is tied
    names = [name for name, _ in made.named_parameters()]
    assert ("lm_head.weight" in names) is not tied
    logits = made(ids()).logits_BTV
    torch.autograd.backward(logits.square().sum())
    assert made.lm_head.weight.grad is not None
    assert made.lm_head.weight.grad.abs().min(1).values.max() > 0


def test_output_has_one_routing_per_sparse_layer_and_logits_on_request() -> None:
    made = model(layers=3, pattern="MD")
    output = made(ids())
    assert len(output.routings) == len(made.moe_modules()) == 2
    assert all(r.logits_TE.shape == (3 * CONTEXT, 4) for r in output.routings)
    bare = made(ids(), logits=False)
    assert bare.logits_BTV is None
    torch.testing.assert_close(made.lm_head(bare.hidden_BTD), output.logits_BTV)


@pytest.mark.parametrize("cached", [0, 4])
def test_more_positions_than_were_learned_are_refused(cached: int) -> None:
    made = model(position="learned")
    cache = made.new_cache(3, 2 * CONTEXT)
    if cached:
        logits_of(made, ids(3, cached), None, cache)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} positions, but the model has learned {CONTEXT}"):
        made(ids(3, CONTEXT + 1 - cached), None, cache)
    assert logits_of(model(), ids(3, CONTEXT + 5)).shape[1] == CONTEXT + 5  # RoPE has no table


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_is_trained(name: str) -> None:
    made = model(**VARIANTS[name]).train()
    torch.manual_seed(0)
    torch.autograd.backward(made(ids()).logits_BTV.square().sum())
    idle = [n for n, p in made.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert idle == []


def test_a_model_from_the_meta_device_computes_the_same_once_it_has_weights() -> None:
    made = model()
    with torch.device("meta"):
        empty = LanguageModel(made.config)
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(logits_of(empty.eval(), ids()), logits_of(made, ids()))


def test_bf16_autocast_stays_close() -> None:
    made = model(position="learned")
    with torch.autocast("cpu", torch.bfloat16):
        half = logits_of(made, ids())
    full = logits_of(made, ids())
    assert (half.float() - full).norm() < 3e-2 * full.norm()


# ---- makeMoE ----------------------------------------------------------------------------------


def makemoe_config(**changed: Any) -> ModelConfig:
    options: dict[str, Any] = {
        "layers": 8,
        "width": 128,
        "vocab_size": 65,
        "context": 32,
        "position": "learned",
        "norm": "layer",
        "head_bias": True,
        "attention": AttentionOptions(heads=8, out_bias=True, scale="width"),
        "experts": ExpertOptions(kind="relu", count=8, hidden=512, bias=True),
        "router": router_options("noisy_top_k", 2, True),
    }
    return ModelConfig(**options | changed)


def from_plain(plain: dict[str, Tensor | None], layers: int, heads: int, experts: int) -> dict[str, Tensor]:
    """The plain model's tensors (weights or gradients; None is left out) under our names."""

    def join(names: list[str], stack: bool) -> Tensor | None:
        found = [plain[name] for name in names]
        some = [t for t in found if t is not None]
        if not some:
            return None
        if not stack:
            return torch.cat(some)
        return torch.stack([torch.zeros_like(some[0]) if t is None else t for t in found])

    made: dict[str, Tensor | None] = {
        "model.embed_tokens.weight": plain["tokens.weight"],
        "model.embed_positions.weight": plain["positions.weight"],
        **{f"model.norm.{leaf}": plain[f"norm.{leaf}"] for leaf in ("weight", "bias")},
        **{f"lm_head.{leaf}": plain[f"head.{leaf}"] for leaf in ("weight", "bias")},
    }
    for i in range(layers):
        ours, theirs = f"model.layers.{i}.", f"blocks.{i}."
        for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
            parts = [f"{theirs}attention.heads.{h}.{name}.weight" for h in range(heads)]
            made[f"{ours}self_attn.{short}_proj.weight"] = join(parts, stack=False)
        for leaf in ("weight", "bias"):
            made[f"{ours}input_layernorm.{leaf}"] = plain[f"{theirs}norm_attention.{leaf}"]
            made[f"{ours}post_attention_layernorm.{leaf}"] = plain[f"{theirs}norm_moe.{leaf}"]
            made[f"{ours}self_attn.o_proj.{leaf}"] = plain[f"{theirs}attention.output.{leaf}"]
            made[f"{ours}mlp.gate.{leaf}"] = plain[f"{theirs}moe.router.{leaf}"]
            made[f"{ours}mlp.gate.noise_{leaf}"] = plain[f"{theirs}moe.noise.{leaf}"]
        for index, name in ((0, "up"), (2, "down")):
            stem = [f"{theirs}moe.experts.{e}.{index}" for e in range(experts)]
            made[f"{ours}mlp.experts.{name}_proj"] = join([f"{s}.weight" for s in stem], stack=True)
            made[f"{ours}mlp.experts.{name}_bias"] = join([f"{s}.bias" for s in stem], stack=True)
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def test_makemoe_has_exactly_the_published_number_of_parameters() -> None:
    made = makemoe_config()
    assert made.parameters().total == 8_996_545
    with torch.device("meta"):
        assert sum(p.numel() for p in LanguageModel(made).parameters()) == 8_996_545


@pytest.mark.parametrize("length", [32, 5])
def test_makemoe_equals_the_plain_model_in_logits_and_gradients(length: int) -> None:
    torch.manual_seed(0)
    plain = ref.PlainMakeMoE(65).eval()
    ours = LanguageModel(makemoe_config()).eval()
    ours.load_state_dict(from_plain(dict(plain.named_parameters()), 8, 8, 8))
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(65, (3, length), generator=generator)
    target_BT = torch.randint(65, (3, length), generator=generator)
    logits, expected = ours(ids_BT).logits_BTV, plain(ids_BT)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    for values in (logits, expected):
        torch.autograd.backward(F.cross_entropy(values.flatten(0, 1), target_BT.flatten()))
    wanted = from_plain({name: p.grad for name, p in plain.named_parameters()}, 8, 8, 8)
    for name, parameter in ours.named_parameters():
        if name not in wanted:
            assert "noise" in name
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, name
        difference = (parameter.grad - wanted[name]).norm()
        assert difference <= 1e-4 * wanted[name].norm() + 1e-7, name
