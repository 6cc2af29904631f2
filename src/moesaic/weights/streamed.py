"""Experts that stay in the files of their model and are read as they are used; nothing is converted."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moesaic.errors import CheckpointError
from moesaic.model.config import ModelConfig
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.experts import StreamedExperts
from moesaic.offload.model import check_config, shape_of
from moesaic.offload.origins import Files, Unchanging
from moesaic.offload.pool import Pool
from moesaic.offload.records import Layout
from moesaic.weights.shards import Shards, Stored

Place = tuple[int | slice, ...]
Sources = Mapping[
    str, Sequence[tuple[str, Place]]
]  # of each parameter: tensors on disk, and which part each is


def is_expert(name: str) -> bool:
    """Whether a parameter of this name belongs to a bank of experts."""
    return ".mlp.experts." in name


def banks_in_files(files: Files, config: ModelConfig, memory: int) -> list[OffloadedExperts]:
    """Banks that read out of ``files``; ``memory`` bytes hold the experts in use. Raises as ``Pool``."""
    layout = Layout(shape_of(config), "bf16" if str(files.dtype) == "torch.bfloat16" else "fp32", None)
    records = Unchanging(files, layout, len(config.moe_layers), config.experts.count)
    source = StreamedExperts(Pool(records, memory), layout)
    return [OffloadedExperts(source, layer, trains=False) for layer in range(records.layers)]


def experts_in_files(config: ModelConfig, sources: Sources, shards: Shards) -> Files:
    """Where each expert's matrices are: whole stacks, or one by one. Raises RecipeError for a model whose
    experts cannot be on disk, CheckpointError where they are stored in several ways."""
    check_config(config)
    shape = shape_of(config)
    first = "gate_up_proj" if shape.kind == "swiglu" else "up_proj"
    names: dict[Path, int] = {}
    found: list[list[list[tuple[Stored, int]]]] = []  # of each layer and expert, its pieces
    for layer in config.moe_layers:
        pieces: list[list[tuple[Stored, int]]] = [[] for _ in range(config.experts.count)]
        for leaf in (first, "down_proj"):
            for source, place in sources[f"model.layers.{layer}.mlp.experts.{leaf}"]:
                stored = shards.tensors[source]
                if place:
                    pieces[_number(place)].append((stored, stored.start))
                    continue
                size = stored.bytes // len(pieces)
                for expert, own in enumerate(pieces):
                    own.append((stored, stored.start + expert * size))
        found.append(pieces)
    ways = {(len(own), *(stored.dtype for stored, _ in own)) for layer_of in found for own in layer_of}
    if len(ways) != 1 or len({stored.dtype for stored, _ in found[0][0]}) != 1:
        raise CheckpointError(f"{shards.directory}: stores some experts otherwise than others")
    for path in sorted({stored.file for layer_of in found for own in layer_of for stored, _ in own}):
        names[path] = len(names)
    files = [(path.absolute(), path.stat().st_size) for path in names]
    file_LEN = np.array([[[names[s.file] for s, _ in own] for own in layer_of] for layer_of in found])
    start_LEN = np.array([[[start for _, start in own] for own in layer_of] for layer_of in found])
    cut, half = shape.inner * shape.width, shape.hidden * shape.width
    bounds = [0, cut, shape.parameters] if file_LEN.shape[2] == 2 else [0, half, cut, shape.parameters]
    return Files(files, found[0][0][0][0].dtype, bounds, file_LEN, start_LEN)


def _number(place: Place) -> int:
    number = place[0]
    assert isinstance(number, int)
    return number
