"""Model directories that are damaged or malicious end in a sentence, soon and in little memory."""

import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_directories import (
    CONFIG,
    attempt,
    cached,
    configure,
    exchange,
    flip,
    join_file,
    link_out,
    parts,
    pipe,
    unloadable,
)
from torch import Tensor

import moesaic
from moesaic.errors import MoesaicError, ResourceError
from moesaic.weights.shards import INDEX, SINGLE

pytestmark = pytest.mark.usefixtures("no_test_hangs")

IDS = torch.arange(12)[None]


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, {"format": "pt"})


def test_what_is_damaged_below_is_whole(stock: dict[str, Path]) -> None:
    expected = moesaic.load(stock["whole"]).logits(IDS)
    assert expected.isfinite().all()
    assert all(torch.equal(moesaic.load(path).logits(IDS), expected) for path in stock.values())
    names = {path.name for path in stock["export"].iterdir()}
    assert names >= {CONFIG, INDEX, "manifest.json", "README.md", "tokenizer.json", "generation_config.json"}


# Files beside the weights


def test_a_tokenizer_that_is_a_pipe_is_not_waited_for(whole: Path) -> None:
    pipe(whole / "tokenizer.json")
    signal.setitimer(signal.ITIMER_REAL, 2)
    with pytest.raises(MoesaicError, match=r"tokenizer\.json"):
        moesaic.load(whole)


def test_a_tokenizer_out_of_the_directory_is_not_read(whole: Path, stock: dict[str, Path]) -> None:
    (whole / "tokenizer.json").symlink_to(stock["told"] / "tokenizer.json")
    with pytest.raises(MoesaicError, match=r"tokenizer\.json: is a link out of its directory"):
        moesaic.load(whole)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja"])
def test_an_export_carries_no_file_from_elsewhere(name: str, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    link_out(whole / name)
    _, said = attempt(lambda: moesaic.export_model(whole, tmp_path / "out"))
    assert not (tmp_path / "out" / name).exists()
    assert not said or name in said


# Weights


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (math.nan, torch.float64),
        (math.nan, torch.float32),
        (math.inf, torch.float16),
        (-math.inf, torch.bfloat16),
    ],
)
def test_weights_that_are_no_numbers_are_named(bad: float, dtype: torch.dtype, whole: Path) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})
        tensors[name][-1, -1] = bad

    rewrite(whole, spoil)
    unloadable(whole, rf"model\.safetensors: {name} holds NaN or infinity")


def test_infinities_do_not_cancel(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors["lm_head.weight"][0, :2].copy_(torch.tensor([1, -1]) * math.inf))
    unloadable(whole, r"lm_head\.weight holds NaN or infinity")


def test_large_weights_are_numbers(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors["lm_head.weight"].fill_(3e38))
    assert (moesaic.load(whole).model.lm_head.weight == 3e38).all()


def test_a_tensor_that_nobody_knows_is_refused_by_name(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors.update({"model.layers.0.adapter.weight": torch.zeros(2, 2)}))
    unloadable(
        whole, r"model\.safetensors: model\.layers\.0\.adapter\.weight has no place in OlmoeForCausalLM"
    )


def test_experts_both_fused_and_one_by_one_are_refused(whole: Path) -> None:
    rewrite(whole, lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 16, 8)}))
    unloadable(whole, r"model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight has no place")


def test_each_missing_tensor_is_named(whole: Path) -> None:
    tensors = load_file(whole / SINGLE)
    for name in tensors:
        others = {key: tensor for key, tensor in tensors.items() if key != name}
        # What is missing is made up for, so that the number of parameters alone tells nothing.
        save_file(others | {"other": torch.zeros(1000)}, whole / SINGLE, {"format": "pt"})
        unloadable(whole, rf"has no tensor {name}, which config\.json needs")


def test_old_constants_are_passed_over(whole: Path) -> None:
    expected = moesaic.load(whole).logits(IDS)
    constant = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((4,), 7.0) for layer in (0, 1)
    }
    rewrite(whole, lambda tensors: tensors.update(constant))
    assert torch.equal(moesaic.load(whole).logits(IDS), expected)


# Memory


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, "2,500"), (torch.bfloat16, "5,000")])
def test_a_model_larger_than_memory_says_what_would_fit(
    dtype: torch.dtype, most: str, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(whole, lambda tensors: tensors.update({key: t.to(dtype) for key, t in tensors.items()}))
    monkeypatch.setattr("moesaic.weights.hf.available_memory", lambda device: 10_000)
    name = str(dtype).removeprefix("torch.")
    unloadable(whole, rf"a model of {most} parameters in {name} would fit", ResourceError, 6)
    monkeypatch.setattr("moesaic.weights.hf.available_memory", lambda device: None)
    moesaic.load(whole)


def test_many_experts_are_not_listed_before_they_are_there(whole: Path) -> None:
    """Shapes that agree with a sparse file of 10 MB, whose only flaw is that no expert is in it."""
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1}
    configure(whole, vocab_size=1, num_hidden_layers=1, num_experts=500_000, **sizes)
    header, end = {}, 0
    shapes = {"model.embed_tokens.weight": [1, 2], "lm_head.weight": [1, 2], "filler": [4_000_000]}
    shapes |= {f"model.layers.0.self_attn.{name}_proj.weight": [2, 2] for name in "qkvo"}
    shapes |= {f"model.layers.0.self_attn.{name}_norm.weight": [2] for name in "qk"}
    shapes |= {f"model.layers.0.{name}_layernorm.weight": [2] for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": [2], "model.layers.0.mlp.gate.weight": [500_000, 2]}
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    join_file(whole / SINGLE, header)
    os.truncate(whole / SINGLE, (whole / SINGLE).stat().st_size + end)
    unloadable(whole, r"has no tensor model\.layers\.0\.mlp\.experts\.0\.gate_proj")


# Exports, whose manifest has checksums


CARRIES_NO_WEIGHTS = ("README.md", "tokenizer_config.json")


def test_every_flipped_bit_of_an_export_is_found(export: Path) -> None:
    expected, rng = moesaic.load(export).logits(IDS), random.Random(0)
    for _ in range(200):
        path = rng.choice(sorted(export.iterdir()))
        before = flip(path, rng.randrange(8 * path.stat().st_size))
        lm, said = attempt(lambda: moesaic.load(export))
        if lm is None:
            assert str(export / path.name) in said
        else:
            assert path.name in CARRIES_NO_WEIGHTS
            assert torch.equal(lm.logits(IDS), expected)
        path.write_bytes(before)
    moesaic.load(export)


@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_of_a_stock_directory_is_a_sentence_or_a_model(whole: Path, sharded: Path) -> None:
    rng = random.Random(0)
    for _ in range(200):
        path = rng.choice([*sorted(whole.iterdir()), *sorted(sharded.iterdir())])
        # A file of weights is little but numbers, and no checksum guards those: aim at its header.
        size = min(path.stat().st_size, 1500 if path.suffix == ".safetensors" else 10**6)
        before = flip(path, rng.randrange(8 * size))
        lm, said = attempt(lambda: moesaic.load(path.parent))  # noqa: B023  called at once
        assert lm is not None or str(path.parent) in said
        path.write_bytes(before)


def test_two_shards_of_an_export_exchanged_are_seen(export: Path) -> None:
    exchange(*parts(export)[:2])
    unloadable(export, r"model-\d+-of-\d+\.safetensors: ")


@pytest.mark.parametrize("kind", ["whole", "told", "export"])
def test_a_hugging_face_cache_opens(kind: str, stock: dict[str, Path], tmp_path: Path) -> None:
    lm = moesaic.load(cached(stock[kind], tmp_path))
    assert torch.equal(lm.logits(IDS), moesaic.load(stock[kind]).logits(IDS))
    assert (lm.known_tokenizer is None) == (kind == "whole")
