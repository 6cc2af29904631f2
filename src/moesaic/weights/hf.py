"""Model directories as Hugging Face's transformers writes them: read, and written so that it reads them.

Our parameters have transformers' names, so only three things differ on disk: experts lie there one by one, a
family may call their module and matrices otherwise (Mixtral), and a tied head is left out.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import CheckpointError, ResourceError
from moesaic.files import human_size
from moesaic.machine import available_memory
from moesaic.model.config import ModelConfig
from moesaic.model.transformer import LanguageModel
from moesaic.offload.model import replace_banks
from moesaic.offload.origins import Files
from moesaic.weights.checkpoint import write_checkpoint
from moesaic.weights.config_json import read_config, write_config
from moesaic.weights.contents import Contents, Later
from moesaic.weights.families import Family
from moesaic.weights.manifest import read_checked, recorded
from moesaic.weights.shards import INDEX, SINGLE, Shards, Stored, read_json_file, real_file, shown
from moesaic.weights.streamed import Place, banks_in_files, experts_in_files, is_expert

Say = Callable[[str], None]

SHARD_BYTES = 5 * 10**9  # what transformers cuts at
_MOST_PARAMETERS = 2**43
_NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # constants that old files carry


def is_hf(directory: Path) -> bool:
    """Whether this looks like such a directory: a config.json, and nothing of our own."""
    return (directory / "config.json").exists() and not (directory / "moesaic.json").exists()


def load_hf(
    directory: Path, device: str, say: Say, memory: int | None = None
) -> tuple[ModelConfig, LanguageModel]:
    """Read a model, tensor by tensor, in the precision in which it is stored; with ``memory``, bytes, its
    experts stay in their files and so much holds those in use.

    Names, shapes and memory are checked before anything is allocated. ``say`` gets a sentence on what the
    reader should know. Raises CheckpointError naming the file, ResourceError where memory is too small, and
    RecipeError for a model that has no experts to leave on disk.
    """
    found = open_hf(directory)
    for note in found.notes:
        say(note)
    config, model = found.config, found.model
    sources, held = found.sources, 0
    if memory is not None:
        banks = banks_in_files(found.experts(), config, memory)
        replace_banks(model, banks)
        held = min(
            memory, len(config.moe_layers) * config.experts.count * banks[0].source.shape.parameters * 4
        )
        sources = {name: parts for name, parts in sources.items() if not is_expert(name)}
    elements = sum(model.get_parameter(name).numel() for name in sources)
    _check_memory(directory, elements * found.dtype.itemsize, held, found.dtype, device)
    for name, parts in sources.items():
        parameter = torch.empty(model.get_parameter(name).shape, dtype=found.dtype, device=device)
        for source, place in parts:
            parameter[place].copy_(found.read(source))
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(parameter))
    if config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return config, model.eval()


@dataclass(frozen=True)
class Found:
    """A directory whose names and shapes have been checked and of whose weights nothing has been read.

    ``model`` has no storage; ``sources`` are, for each of its parameters, the tensors on disk that make it.
    """

    family: Family
    config: ModelConfig
    notes: list[str]
    shards: Shards
    model: LanguageModel
    sources: dict[str, list[tuple[str, Place]]]

    @property
    def dtype(self) -> torch.dtype:
        """The widest of its tensors."""
        return _widest([self.shards.tensors[s].dtype for parts in self.sources.values() for s, _ in parts])

    def experts(self) -> Files:
        """Where its experts are. Raises CheckpointError."""
        return experts_in_files(self.config, self.sources, self.shards)

    def read(self, source: str) -> Tensor:
        """One tensor of the files. Raises CheckpointError, also for NaN and infinities."""
        tensor = self.shards.read(source)
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise CheckpointError(f"{self.shards.tensors[source].file}: {source} holds NaN or infinity")
        return tensor


def open_hf(directory: Path) -> Found:
    """Check a directory before anything of its size is allocated. Raises CheckpointError naming the file."""
    entries = recorded(directory)
    path = directory / "config.json"
    table = read_json_file(path, entries.get("config.json"))
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: is not a table of settings")
    family, config, notes = read_config(table, str(path))
    total = config.parameters().total
    if total > _MOST_PARAMETERS:
        raise CheckpointError(f"{path}: describes {total:,} parameters, which no such file has")
    shards = Shards(directory, ignore=_NOT_WEIGHTS)
    on_disk = sum(_elements(stored) for stored in shards.tensors.values())
    if on_disk < total:
        raise CheckpointError(f"{path}: describes {total:,} parameters, its files hold {on_disk:,}")
    with torch.device("meta"):
        model = LanguageModel(config)
    return Found(family, config, notes, shards, model, _sources(model, family, shards))


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a directory, None where it has none. Raises CheckpointError, DataError."""
    path, entry = directory / "tokenizer.json", recorded(directory).get("tokenizer.json")
    if not os.path.lexists(path):
        return None
    real = real_file(path)
    if entry is not None:
        read_checked(real, entry, keep=False)
    return Tokenizer.load(real)


def stop_ids(directory: Path) -> frozenset[int]:
    """The ids that end a text, by generation_config.json or config.json. Raises CheckpointError."""
    entries = recorded(directory)
    for name in ("generation_config.json", "config.json"):
        if (directory / name).exists():
            table = read_json_file(directory / name, entries.get(name))
            ids = table.get("eos_token_id") if isinstance(table, dict) else None
            found = [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
            if found:
                return frozenset(found)
    return frozenset()


def model_type(directory: Path) -> str | None:
    """The family of a directory that was written by others, None for one of ours."""
    return str(read_json_file(directory / "config.json")["model_type"]) if is_hf(directory) else None


def write_hf(
    out: Path,
    config: ModelConfig,
    model: LanguageModel,
    files: dict[str, bytes],
    eos: list[int],
    prefer: str | None = None,
) -> Family:
    """Write a directory that ``AutoModelForCausalLM.from_pretrained`` opens, experts one by one, with a
    manifest of checksums. ``files`` go beside it as they are (tokenizer, model card). Of several families
    that could express the model it becomes one of ``prefer``.

    Raises RecipeError where no stock architecture can express the model, and as ``write_checkpoint``.
    """
    family, _ = write_config(config, prefer)
    tensors = ((name, Later(t.shape, t.dtype, _same(t))) for name, t in tensors_on_disk(model, family))
    write_tensors(
        out, config, family, tensors, model.lm_head.weight.dtype, files, {"eos_token_id": _one(eos)}
    )
    return family


def write_tensors(
    out: Path,
    config: ModelConfig,
    family: Family,
    tensors: Iterable[tuple[str, Later]],
    dtype: torch.dtype,
    files: dict[str, bytes],
    extra: dict[str, Any],
) -> None:
    """``write_hf`` for tensors that are made when they are written, under the family's names. ``extra`` goes
    into config.json, and its ids of special tokens into generation_config.json. Raises as ``write_hf``."""
    _, table = write_config(config, family.model_type)
    ids = {key: extra.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    name = str(dtype).removeprefix("torch.")
    table.update({**extra, "dtype": name, "torch_dtype": name, **ids})
    generation = {key: value for key, value in ids.items() if value is not None or key == "eos_token_id"}
    contents = Contents(json={"config.json": table, "generation_config.json": generation}, files=dict(files))
    shards = _cut(tensors)
    for number, part in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents.later[file] = part
    if len(shards) > 1:
        where = {key: file for file, part in contents.later.items() for key in part}
        size = sum(map(_bytes, (later for part in shards for later in part.values())))
        contents.json[INDEX] = {"metadata": {"total_size": size}, "weight_map": where}
    write_checkpoint(out, contents)


def tensors_on_disk(model: LanguageModel, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the family's name; views of the parameters, which are not copied."""
    for name, parameter in model.named_parameters():
        for source, place in parts_on_disk(name, parameter.shape, family):
            yield source, parameter.detach()[place]


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and the tokenizer_config.json with which ``AutoTokenizer`` opens it."""
    eos = None if tokenizer.eos_id is None else tokenizer.library.id_to_token(tokenizer.eos_id)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        **({"eos_token": eos} if eos else {}),
    }
    return {
        "tokenizer.json": tokenizer.library.to_str(pretty=True).encode(),
        "tokenizer_config.json": (json.dumps(described, indent=1) + "\n").encode(),
    }


def parts_on_disk(name: str, shape: torch.Size, family: Family) -> Iterator[tuple[str, Place]]:
    """The names under which a parameter lies on disk, and which part of it each is."""
    gate, up, down = family.experts
    module, _, leaf = name.rpartition(".")
    if module.endswith(".mlp.experts"):
        module = module.removesuffix("mlp.experts") + f"{family.mlp}.experts"
        for expert in range(shape[0]):
            if leaf == "gate_up_proj":
                yield f"{module}.{expert}.{gate}.weight", (expert, slice(None, shape[1] // 2))
                yield f"{module}.{expert}.{up}.weight", (expert, slice(shape[1] // 2, None))
            else:
                yield f"{module}.{expert}.{down}.weight", (expert,)
    elif name.endswith(".mlp.gate.weight"):
        yield name.removesuffix("mlp.gate.weight") + f"{family.mlp}.gate.weight", ()
    else:
        yield name, ()


def _sources(model: LanguageModel, family: Family, shards: Shards) -> dict[str, list[tuple[str, Place]]]:
    """For each parameter the tensors on disk that make it: experts one by one, or fused as transformers 5
    holds them in memory. Every tensor is used, and every one has the shape that is wanted."""
    sources: dict[str, list[tuple[str, Place]]] = {}
    used = {"lm_head.weight"} if model.config.tied else set()
    for name, parameter in model.named_parameters():
        parts = parts_on_disk(name, parameter.shape, family)
        fused = [name, name.replace(".mlp.", f".{family.mlp}.")]
        whole = next((other for other in fused if other in shards.tensors), None)
        if whole is not None:
            parts = iter([(whole, ())])
        sources[name] = []
        for source, place in parts:  # the first that is missing ends it, however many config.json asks for
            if source not in shards.tensors:
                raise CheckpointError(f"{shards.directory}: has no tensor {source}, which config.json needs")
            wanted, stored = tuple(parameter[place].shape), shards.tensors[source]
            if stored.shape != wanted:
                raise CheckpointError(
                    f"{stored.file}: {source} is {list(stored.shape)}, and {list(wanted)} by config.json"
                )
            used.add(source)
            sources[name].append((source, place))
    foreign = sorted(shards.tensors.keys() - used)
    if foreign:
        raise CheckpointError(
            f"{shards.tensors[foreign[0]].file}: {shown(foreign[0])} has no place in "
            f"{family.architecture} as config.json describes it"
        )
    return sources


def _cut(tensors: Iterable[tuple[str, Later]]) -> list[dict[str, Later]]:
    shards: list[dict[str, Later]] = [{}]
    size = 0
    for name, later in tensors:
        size += _bytes(later)
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = _bytes(later)
        shards[-1][name] = later
    return shards


def _bytes(later: Later) -> int:
    return later.shape.numel() * later.dtype.itemsize


def _same(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _one(ids: list[int]) -> int | list[int] | None:
    return ids[0] if len(ids) == 1 else ids or None


def _check_memory(directory: Path, weights: int, held: int, dtype: torch.dtype, device: str) -> None:
    """``held`` bytes are for experts that are on disk otherwise."""
    needed, free = weights + held, available_memory(device)
    if free is not None and needed > free:
        name, most = str(dtype).removeprefix("torch."), free // dtype.itemsize
        mend = "give offload.memory less" if held else f"a model of {most:,} parameters in {name} would fit"
        raise ResourceError(
            f"{directory}: its weights need {human_size(needed)} of memory, {human_size(free)} are free; "
            f"{mend}"
        )


def _widest(dtypes: list[torch.dtype]) -> torch.dtype:
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _elements(stored: Stored) -> int:
    return stored.bytes // stored.dtype.itemsize
