"""Tiny dense models as transformers saves them, with a tokenizer, and experts that differ from them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import MoesaicError
from moesaic.merge.merge import merge, plan_merge
from moesaic.merge.options import MergeOptions

TEXT = "the old mill by the stream turns and turns; a miller counts his sacks: 1, 2, 3.\n"
# A chat template that a character tokenizer of TEXT can read.
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id")),
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
    "olmo2": {},
}
TARGETS = {
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
    "olmo2": "FlexOlmoForCausalLM",
}


def dense(directory: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random dense model whose every weight has been moved, norms and biases too."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.char(TEXT)
    config = transformers.AutoConfig.for_model(
        kind, **{**SHAPE, "vocab_size": tokenizer.vocab_size, **FAMILIES[kind], **changes}
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save(directory / "tokenizer.json")
    return directory


def change(source: Path, directory: Path, seed: int, *only: str) -> Path:
    """A copy of a model in which the tensors whose names hold one of ``only`` (all, if none) have moved."""
    from safetensors.torch import load_file, save_file

    directory.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (directory / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if not only or any(part in name for part in only):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def chat_template(directory: Path, source: str, **more: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **more}))


def options(base: Path, *experts: Path, **more: Any) -> MergeOptions:
    table = {"base": str(base), "experts": {p.name: str(p) for p in experts}, **more}
    return MergeOptions.model_validate(table)


def merged(out: Path, base: Path, *experts: Path, **more: Any) -> Path:
    merge(options(base, *experts, **more), out, lambda _: None)
    return out


def refused(sentence: str, base: Path, *experts: Path, **more: Any) -> None:
    with pytest.raises(MoesaicError, match=sentence):
        plan_merge(options(base, *experts, **more))
