"""The dense models that a merge takes from, and whether they go together.

A donor is a Hugging Face directory of a dense family, or a LoRA adapter (the ``peft`` format) of the base.
Nothing of the size of a model is read here; ``read`` gives one tensor at a time.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.config import flatten
from moesaic.data.tokenizers import Tokenizer
from moesaic.errors import CheckpointError, RecipeError
from moesaic.merge.options import MergeOptions
from moesaic.model.config import ModelConfig
from moesaic.weights.families import FAMILIES
from moesaic.weights.hf import Found, load_tokenizer, open_hf
from moesaic.weights.shards import Shards, read_json_file

ADAPTER = "adapter_config.json"
# What may differ: the context and the vocabulary are reconciled, the rest says nothing of a dense model.
_FREE = ("vocab_size", "context", "pattern", "dropout", "init.", "experts.", "router.")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """Low-rank changes W + scale · B A (Hu et al. 2021, arXiv 2106.09685, eq. 3), by the module they
    change."""

    shards: Shards
    scale: float
    modules: frozenset[str]
    transposed: bool = False

    def change(self, name: str) -> Tensor | None:
        """What is added to the weight ``name``, float32; None where nothing is."""
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return None
        a, b = (self.shards.read(f"{_PEFT_PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        change = self.scale * (b @ a)
        if not change.isfinite().all():
            raise CheckpointError(f"{self.shards.directory}: its change of {module} holds NaN or infinity")
        return change.t() if self.transposed else change


@dataclass(frozen=True)
class Donor:
    """One dense model. ``notes`` are sentences on what the reader should know."""

    name: str
    directory: Path
    found: Found
    tokenizer: Tokenizer | None
    adapter: Adapter | None = None
    notes: list[str] = field(default_factory=list)

    def read(self, name: str) -> Tensor:
        """A tensor by its name in ``transformers``, float32, an adapter's change applied. Raises
        CheckpointError."""
        tensor = self.found.read(name).float()
        change = None if self.adapter is None else self.adapter.change(name)
        if change is None:
            return tensor
        if change.shape != tensor.shape:
            raise CheckpointError(f"{self.directory}: its change of {name} is {list(change.shape)}")
        return tensor + change


def open_donors(options: MergeOptions) -> tuple[Donor, list[Donor]]:
    """The base and the experts, each checked by itself and against the base.

    Raises RecipeError with a line for every mismatch, CheckpointError for a damaged directory.
    """
    base = _open("base", user_path(options.base), None)
    experts = [_open(name, user_path(source.model), base) for name, source in options.experts.items()]
    problems = [problem for donor in experts for problem in _mismatches(base, donor)]
    if problems:
        raise RecipeError("\n".join(problems))
    return base, experts


def user_path(text: str | Path) -> Path:
    """A path as a user writes it. Raises RecipeError for a home that is nobody's."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise RecipeError(f"{text}: there is no such user's home") from None


def _open(name: str, directory: Path, base: Donor | None) -> Donor:
    if not directory.is_dir():
        raise RecipeError(f"{name}: {directory}: no such directory; models are not downloaded")
    if (directory / ADAPTER).exists():
        if base is None:
            raise RecipeError(f"{directory}: is an adapter; the base must be a whole model")
        return _open_adapter(name, directory, base)
    if not (directory / "config.json").exists():
        raise RecipeError(
            f"{name}: {directory}: has no config.json; give a Hugging Face model directory "
            "(moesaic export makes one of a run)"
        )
    found = open_hf(directory)
    if found.family.sparse:
        raise RecipeError(f"{name}: {directory}: is a mixture of experts already; a merge takes dense models")
    return Donor(name, directory, found, load_tokenizer(directory), notes=list(found.notes))


def _open_adapter(name: str, directory: Path, base: Donor) -> Donor:
    path = directory / ADAPTER
    table = read_json_file(path)
    if not isinstance(table, dict) or table.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is not LORA; other adapters cannot be merged into weights")
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if table.get(key):
            raise CheckpointError(f"{path}: {key}: is not supported; merge the adapter with peft first")
    if str(table.get("init_lora_weights", True)).startswith(("pissa", "olora")):
        raise CheckpointError(
            f"{path}: init_lora_weights changed the base itself; convert the adapter with peft first"
        )
    rank, alpha = table.get("r"), table.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: r and lora_alpha are not numbers")
    shards = Shards(directory, file="adapter_model.safetensors")
    sides: dict[str, set[str]] = {}
    for tensor, stored in shards.tensors.items():
        module, _, side = tensor.removeprefix(_PEFT_PREFIX).rpartition(".lora_")
        changed = base.found.shards.tensors.get(f"{module}.weight")
        if side not in ("A.weight", "B.weight") or changed is None:
            raise CheckpointError(f"{directory}: {tensor!r} changes nothing that the base has")
        out, inner = changed.shape if not table.get("fan_in_fan_out") else changed.shape[::-1]
        wanted = (rank, inner) if side == "A.weight" else (out, rank)
        if stored.shape != wanted:
            raise CheckpointError(
                f"{directory}: {tensor} is {list(stored.shape)}, and {list(wanted)} would fit"
            )
        sides.setdefault(module, set()).add(side)
    lone = [module for module, found in sides.items() if len(found) < 2]
    if lone:
        raise CheckpointError(f"{directory}: has only half of its change of {lone[0]}")
    modules = frozenset(sides)
    if not modules:
        raise CheckpointError(f"{directory}: the adapter changes nothing")
    scale = alpha / (rank**0.5 if table.get("use_rslora") else rank)
    outside = sorted({m.rpartition(".")[2] for m in modules if ".mlp." not in m})
    notes = []
    if outside:
        notes.append(
            f"the adapter also changes {', '.join(outside)}, which follow the rule for shared weights"
        )
    adapter = Adapter(shards, scale, modules, bool(table.get("fan_in_fan_out")))
    return Donor(name, directory, base.found, load_tokenizer(directory), adapter, notes)


def _mismatches(base: Donor, donor: Donor) -> list[str]:
    """A sentence for every way in which an expert cannot share with the base."""
    mine, its = (_settings(d.found.config) for d in (base, donor))
    words = {
        path: key for key, paths in FAMILIES[base.found.family.model_type].keys.items() for path in paths
    }
    problems = []
    for path in sorted(mine.keys() | its.keys()):
        if path.startswith(_FREE) or mine.get(path) == its.get(path):
            continue
        problems.append(
            f"{donor.name}: {words.get(path, path)} = {_said(its.get(path))}, and {_said(mine.get(path))} in "
            "the base; take experts tuned from this base"
        )
    if not problems and base.tokenizer is not None and donor.tokenizer is not None:
        problems += _other_words(base.tokenizer, donor)
    return problems


def _settings(config: ModelConfig) -> dict[str, Any]:
    """Dotted settings, those that a config.json may leave open filled in."""
    size = config.attention.head_size(config.width)
    return {**flatten(config), "attention.head_dim": size}


def _other_words(base: Tokenizer, donor: Donor) -> list[str]:
    """Vocabularies may differ by tokens that one of them has added; what both have must be the same token."""
    assert donor.tokenizer is not None
    mine, its = (t.library.get_vocab(with_added_tokens=True) for t in (base, donor.tokenizer))
    of_id = {number: token for token, number in mine.items()}
    for token, number in sorted(its.items(), key=lambda pair: pair[1]):
        if mine.get(token, number) != number or of_id.get(number, token) != token:
            return [
                f"{donor.name}: its tokenizer has {token!r} at {number}, where the base's has "
                f"{of_id.get(number)!r}; take experts with the base's tokenizer"
            ]
    return []


def _said(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def widest(donors: list[Donor]) -> torch.dtype:
    """The dtype that loses nothing of any donor."""
    dtype = donors[0].found.dtype
    for donor in donors[1:]:
        dtype = torch.promote_types(dtype, donor.found.dtype)
    return dtype
