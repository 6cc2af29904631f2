"""One GGUF file as llama.cpp reads it.

The families are those of ``families.py``; ``_ARCHITECTURES`` says under which name llama.cpp knows each and
what its graph hard-codes (llama.cpp src/models/*.cpp), so that a model it would compute otherwise is refused
and not written. Names of tensors come from the ``gguf`` library. Llama's graph rotates neighbouring pairs, so
its queries and keys are permuted; the others rotate halves as we do.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.data.tokenizers import Tokenizer, characters_of_bytes
from moesaic.errors import RecipeError
from moesaic.files import explained, sync_directory
from moesaic.model.attention import rope_frequencies
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import LanguageModel
from moesaic.weights.config_json import write_config
from moesaic.weights.families import FAMILIES

KINDS = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class _Architecture:
    """``renormalize``: what the graph does with the weights of the chosen experts; None where it has none."""

    name: str
    renormalize: bool | None = None
    permuted: bool = False  # queries and keys, for a graph that rotates neighbours
    biases: tuple[str, ...] = ()  # attention biases that its loader looks for
    dense_layers: bool = True
    grouped: bool = True  # whether there may be fewer key-value heads


_ARCHITECTURES = {
    "olmoe": _Architecture("olmoe", renormalize=False, dense_layers=False, grouped=False),
    "mixtral": _Architecture("llama", renormalize=True, permuted=True, dense_layers=False),
    "qwen2_moe": _Architecture("qwen2moe", renormalize=False, biases=("qkv",), dense_layers=False),
    "qwen3_moe": _Architecture("qwen3moe", renormalize=True, dense_layers=False),
    "llama": _Architecture("llama", permuted=True, biases=("qkv", "out")),
    "mistral": _Architecture("llama", permuted=True),
    "qwen2": _Architecture("qwen2", biases=("qkv",)),
    "qwen3": _Architecture("qwen3"),
    "olmo2": _Architecture("olmo2"),
}

# The pre-tokenizers that llama.cpp knows by name, by the expression that tokenizer.json holds.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}


def write_gguf(
    out: Path,
    config: ModelConfig,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    kind: str,
    eos: list[int],
) -> str:
    """Write ``out`` and return llama.cpp's name of the architecture. Matrices are stored as ``kind`` (one of
    ``KINDS``), vectors and routers in float32. ``out`` appears whole or not at all.

    Raises RecipeError for a model or tokenizer that llama.cpp cannot express, naming what stands in the way.
    """
    try:
        import gguf
    except ImportError:
        raise RecipeError("GGUF needs the gguf package; pip install 'moesaic[gguf]'") from None
    family, _ = write_config(config)
    architecture = _ARCHITECTURES.get(family.model_type)
    if architecture is None:
        raise RecipeError(f"llama.cpp has no architecture for {family.architecture}")
    problems = _obstacles(config, architecture)
    if problems:
        raise RecipeError(f"llama.cpp's {architecture.name} cannot express this model: {'; '.join(problems)}")
    words = None if tokenizer is None else _vocabulary(tokenizer, config.vocabulary)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    writer = gguf.GGUFWriter(temporary, architecture.name)
    try:
        _write_settings(writer, config, name, kind)
        _write_vocabulary(writer, words, config, eos)
        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
        names = gguf.get_tensor_name_map(number, config.layers)
        for tensor_name, tensor in _tensors(model, config, architecture):
            _add(writer, names, tensor_name, tensor, kind)
        with explained(out.parent, f"{out} cannot be written"):
            out.parent.mkdir(parents=True, exist_ok=True)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            descriptor = os.open(temporary, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
            os.replace(temporary, out)
            sync_directory(out.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return architecture.name


def _obstacles(config: ModelConfig, architecture: _Architecture) -> list[str]:
    attention, problems = config.attention, []
    if config.moe_layers:
        renormalize = bool(getattr(config.router, "renormalize", False)) or config.router.weights_sum_to_one
        if renormalize != architecture.renormalize:
            said = "always" if architecture.renormalize else "never"
            problems.append(f"it {said} renormalises the weights of the chosen experts")
        if not architecture.dense_layers and len(config.moe_layers) < config.layers:
            problems.append("it has no dense layers among sparse ones")
    if attention.qkv_bias and "qkv" not in architecture.biases:
        problems.append("it has no attention biases")
    if attention.out_bias and "out" not in architecture.biases:
        problems.append("it has no bias after attention")
    if not architecture.grouped and attention.num_kv_heads != attention.heads:
        problems.append("it wants as many key-value heads as heads")
    if attention.rope_scaling is not None and architecture.name != "llama":
        problems.append("it has no llama3 scaling of rotary positions")
    return problems


def _write_settings(writer: Any, config: ModelConfig, name: str, kind: str) -> None:
    import gguf

    attention = config.attention
    size = attention.head_size(config.width)
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")))
    writer.add_vocab_size(config.vocabulary)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.layers)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(attention.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_feed_forward_length(config.experts.hidden if config.moe_layers else config.ffn.hidden)
    if config.moe_layers:
        writer.add_expert_count(config.experts.count)
        writer.add_expert_used_count(config.router.top_k)
        writer.add_expert_feed_forward_length(config.experts.hidden)
        if config.experts.shared_hidden:
            writer.add_expert_shared_feed_forward_length(config.experts.shared_hidden)


def _vocabulary(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str], str]:
    """Tokens, their types, merges and the pre-tokenizer's name, for llama.cpp's byte-level BPE. Characters
    and bytes are such a BPE without merges."""
    import gguf

    spec = tokenizer.spec
    vocabulary = tokenizer.library.get_vocab(with_added_tokens=True)
    if tokenizer.kind == "other" or (tokenizer.kind == "char" and max(map(ord, vocabulary)) > 127):
        what = "characters beyond ASCII" if tokenizer.kind == "char" else "no byte-level BPE"
        raise RecipeError(
            f"the tokenizer has {what}, which this export does not write; export --to hf and use llama.cpp's "
            "convert_hf_to_gguf.py, or train with data.tokenizer=bpe"
        )
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for token, number in vocabulary.items():
        tokens[number] = characters_of_bytes(token.encode()) if tokenizer.kind == "char" else token
        types[number] = int(gguf.TokenType.NORMAL)
    for added in spec["added_tokens"]:
        types[added["id"]] = int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)
    merges = [] if tokenizer.kind == "char" else spec["model"]["merges"]
    return tokens, types, [m if isinstance(m, str) else " ".join(m) for m in merges], _pre_tokenizer(spec)


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    if not spec["model"].get("merges"):
        return "gpt-2"  # nothing is merged, so where words end does not matter
    pre = spec["pre_tokenizer"] or {}
    for step in pre.get("pretokenizers", [pre]):
        if step.get("type") == "Split":
            found = _PRE_TOKENIZERS.get(step["pattern"].get("Regex"))
            if found is not None:
                return found
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
            return "gpt-2"
    raise RecipeError(
        "the tokenizer splits words in a way that this export has no name for; export --to hf and use "
        "llama.cpp's convert_hf_to_gguf.py"
    )


def _write_vocabulary(
    writer: Any,
    words: tuple[list[str], list[int], list[str], str] | None,
    config: ModelConfig,
    eos: list[int],
) -> None:
    if words is None:
        writer.add_tokenizer_model("none")
        return
    tokens, types, merges, pre = words
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    # llama.cpp wants the list, the format no empty one: a pair that no text has stands for "none".
    writer.add_token_merges(merges or [f"{tokens[0]}\u0001 {tokens[0]}\u0001"])
    writer.add_add_bos_token(False)
    if eos:
        writer.add_eos_token_id(eos[0])


def _tensors(
    model: LanguageModel, config: ModelConfig, architecture: _Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors as llama.cpp wants them: gate and up apart, a head even where it is tied."""
    heads = {"q_proj": config.attention.heads, "k_proj": config.attention.num_kv_heads}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        leaf = name.rpartition(".")[2]
        projection = name.split(".")[-2] if "." in name else ""
        if leaf == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            yield f"{stem}gate_proj.weight", gate
            yield f"{stem}up_proj.weight", up
        elif name.endswith(".experts.down_proj"):
            yield f"{name}.weight", tensor
        elif architecture.permuted and projection in heads:
            halves = tensor.view(heads[projection], 2, -1, *tensor.shape[1:])
            yield name, halves.transpose(1, 2).reshape(tensor.shape)
        else:
            yield name, tensor
    if config.tied:
        yield "lm_head.weight", model.lm_head.weight.detach()
    if config.attention.rope_scaling is not None:
        size = config.attention.head_size(config.width)
        plain = config.attention.model_copy(update={"rope_scaling": None})
        yield "rope_freqs.weight", rope_frequencies(plain, size) / rope_frequencies(config.attention, size)


def _add(writer: Any, names: Any, name: str, tensor: Tensor, kind: str) -> None:
    import gguf

    stem, _, suffix = name.rpartition(".")
    known = "rope_freqs" if stem == "rope_freqs" else names.get_name(stem)
    if known is None:
        raise RecipeError(f"llama.cpp has no place for {name}")
    tensor = tensor.cpu().squeeze(0) if known.endswith("inp_shexp") else tensor.cpu()
    small = tensor.ndim < 2 or known.endswith("ffn_gate_inp")
    wanted = "f32" if small or (kind == "q8_0" and tensor.shape[-1] % 32) else kind
    data: NDArray[Any]
    raw = None
    if wanted == "bf16":
        data = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
        raw = gguf.GGMLQuantizationType.BF16
    elif wanted == "q8_0":
        raw = gguf.GGMLQuantizationType.Q8_0
        data = gguf.quants.quantize(tensor.float().numpy(), raw)
    else:
        data = np.ascontiguousarray(tensor.to(torch.float16 if wanted == "f16" else torch.float32).numpy())
        if not np.isfinite(data).all():
            raise RecipeError(f"{name}: {wanted} cannot hold all of the weights; use --dtype bf16")
    writer.add_tensor(f"{known}.{suffix}", data, raw_dtype=raw)


assert _ARCHITECTURES.keys() == FAMILIES.keys() - {"flex_olmo"}  # which llama.cpp does not have
