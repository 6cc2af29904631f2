"""A model whose experts are on disk: its banks taken out and replaced by those of a store."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from moesaic.config import Options
from moesaic.errors import CheckpointError, RecipeError, ResourceError
from moesaic.files import human_size
from moesaic.machine import total_memory
from moesaic.model.config import InitOptions, ModelConfig
from moesaic.model.experts import Experts
from moesaic.model.init import initialise
from moesaic.model.transformer import LanguageModel
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.catch_up import AdamW
from moesaic.offload.experts import DiskExperts
from moesaic.offload.origins import Files, Generated, Origin
from moesaic.offload.pool import Pool, check_memory
from moesaic.offload.records import ExpertShape, Layout, WeightKind
from moesaic.offload.store import Index, Store, StoreOptions

FOLDER = "experts"  # in a run directory
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class OffloadOptions(Options):
    """Experts on disk, of which ``memory`` ("2GiB") holds those in use; not given: all are in memory.

    ``weights`` in bfloat16 are rounded stochastically (``auto``: so they are, unless the run begins from a
    model that has more bits of them); ``moments`` of AdamW are float32, bfloat16 or int8 in blocks of 256.
    ``mode``: ``exact`` equals dense AdamW, ``lazy`` counts an expert's own steps. ``threads`` read and write
    at once.
    """

    memory: str | None = None
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    moments: Literal["fp32", "bf16", "int8"] = "int8"
    mode: Literal["exact", "lazy"] = "exact"
    threads: int = Field(8, ge=1, le=64)

    @field_validator("memory", mode="before")
    @classmethod
    def _is_a_size(cls, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        bytes_of(str(value))
        return str(value)


def bytes_of(size: str) -> int:
    """``2GiB``, ``500MB`` or a plain number as bytes. Raises ValueError."""
    match = _SIZE.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{size!r} is no size; write it as 2GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def build_on_disk(
    config: ModelConfig,
    options: OffloadOptions,
    constants: AdamW,
    seed: int,
    folder: Path,
    origin: Files | None = None,
) -> tuple[LanguageModel, DiskExperts]:
    """A new model, initialised from torch's global generator but for its experts, whose store is made or
    opened in ``folder``; they begin as those of ``origin``, whose model then has the other weights too, and
    the new one has no storage yet. Raises RecipeError for what cannot be on disk, and as ``Store.open``."""
    check_config(config)
    with torch.device("meta"):
        model = LanguageModel(config)
    whole = origin is not None and origin.dtype != torch.bfloat16
    weights: WeightKind = ("fp32" if whole else "bf16") if options.weights == "auto" else options.weights
    layout = Layout(shape_of(config), weights, options.moments)
    memory = bytes_of(str(options.memory))
    check_memory(memory, layout.bytes)
    begin: Origin = origin or Generated(seed, _stds(config.init, layout.shape))
    wanted = StoreOptions(layout, len(config.moe_layers), config.experts.count, begin)
    if not (folder.parent / "recipe.toml").exists():
        _remove_half_made(folder)
    store = Store.open(folder, wanted, write=True)
    try:
        experts = DiskExperts(Pool(store, memory, options.threads), store, constants, options.mode)
    except BaseException:
        store.close()
        raise
    replace_banks(model, experts.banks)
    if origin is None:
        model.to_empty(device="cpu")
        if config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        initialise(model, config.init)
    return model, experts


def _remove_half_made(folder: Path) -> None:
    """What a start that failed or was killed left: nothing refers to it, and it may be another model's."""
    for name in ("records.bin", "store.json"):
        (folder / name).unlink(missing_ok=True)


def replace_banks(model: LanguageModel, banks: Sequence[OffloadedExperts]) -> None:
    """Put these banks in the place of a model's own."""
    for module, bank in zip(model.moe_modules(), banks, strict=True):
        module.experts = bank


@torch.no_grad()
def into_memory(model: LanguageModel) -> LanguageModel:
    """Give a model whose experts are on disk banks of its own, in float32; any other stays as it is. Raises
    ResourceError where memory cannot hold them."""
    config, memory = model.config, total_memory()
    banks = [(module, module.experts) for module in model.moe_modules()]
    needed = 4 * config.parameters().total
    on_disk = any(isinstance(bank, OffloadedExperts) for _, bank in banks)
    if on_disk and memory is not None and needed > memory:
        raise ResourceError(
            f"all experts in memory take {human_size(needed)} and this machine has {human_size(memory)}; "
            "they can only be used where they are, on disk"
        )
    for module, bank in banks:
        if isinstance(bank, OffloadedExperts):
            own = Experts(config.experts, config.width)
            for expert in range(config.experts.count):
                first, down = bank.source.gather(bank.layer, [expert], torch.float32)
                own.first_matrix[expert], own.down_proj[expert] = first[0], down[0]
            module.experts = own
    return model


def about(experts: DiskExperts) -> dict[str, Any]:
    """What a checkpoint says of its experts besides the index: what catching up needs."""
    frozen = [bank.layer for bank in experts.banks if not bank.trains]
    return {**vars(experts.history.constants), "mode": experts.mode, "frozen": frozen}


def index_tensors(experts: DiskExperts) -> dict[str, Tensor]:
    """What a checkpoint holds of the store, the rates of all steps among it."""
    rates = torch.tensor(experts.history.rates, dtype=torch.float64)
    return {**experts.store.index.tensors(), "rates": rates}


def read_on_disk(folder: Path, said: dict[str, Any], tensors: dict[str, Tensor], memory: int) -> DiskExperts:
    """The experts of a checkpoint, to be read only. Raises CheckpointError where the store is not that of the
    checkpoint, and as ``Store.open``."""
    store = Store.open(folder)
    index = Index.of(tensors)
    if index.place.shape != (store.options.layers, store.options.experts):
        raise CheckpointError(f"{folder}: holds the experts of another model")
    store.go_back(index, [])
    said = dict(said)
    mode, frozen = said.pop("mode"), said.pop("frozen")
    experts = DiskExperts(Pool(store, memory), store, AdamW(**said), mode)
    for bank in experts.banks:
        bank.trains = bank.layer not in frozen
    for rate in tensors["rates"].tolist():
        experts.history.add(rate)
    return experts


def check_config(config: ModelConfig) -> None:
    """Raise RecipeError for a model whose experts cannot be on disk."""
    if not config.moe_layers:
        raise RecipeError("offload.memory: this model has no experts to put on disk")
    if config.experts.bias:
        raise RecipeError("offload.memory: experts on disk have no biases; set model.experts.bias to false")
    if config.dropout:
        raise RecipeError("offload.memory: experts on disk know no dropout; set model.dropout to 0")


def shape_of(config: ModelConfig) -> ExpertShape:
    """That of one expert."""
    return ExpertShape(config.experts.kind, config.width, config.experts.hidden)


def _stds(options: InitOptions, shape: ExpertShape) -> tuple[float, float]:
    """The standard deviations of an expert's first and last matrix, as model/init.py has them."""
    fans = ((shape.width, shape.inner), (shape.hidden, shape.width))
    if options.kind == "kaiming":
        first, last = (math.sqrt(2 / fan_in) for fan_in, _ in fans)
    elif options.kind == "xavier":
        first, last = (math.sqrt(2 / (fan_in + fan_out)) for fan_in, fan_out in fans)
    else:
        first = last = options.std
    return first, 0.0 if options.zero_output else last
