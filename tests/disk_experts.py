"""Small stores of experts, banks out of them, and the same experts held in memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.model.dispatch import Dispatch, sort_by_expert
from moesaic.model.experts import ExpertOptions, Experts, FFNKind
from moesaic.offload.catch_up import AdamW
from moesaic.offload.experts import DiskExperts
from moesaic.offload.origins import Generated
from moesaic.offload.pool import Pool
from moesaic.offload.records import ExpertShape, Layout, MomentKind, WeightKind
from moesaic.offload.store import Store, StoreOptions
from moesaic.routing import Routing

D, H, E, L = 8, 6, 12, 2
CONSTANTS = AdamW(0.9, 0.95, 1e-8, 0.1)


def options(
    kind: FFNKind = "swiglu", weights: WeightKind = "fp32", moments: MomentKind | None = "fp32", **more: Any
) -> StoreOptions:
    hidden = more.pop("hidden", H)
    begin = Generated(more.pop("seed", 7), more.pop("std", (0.2, 0.2)))
    settings = {"layers": L, "experts": E, "origin": begin, **more}
    return StoreOptions(Layout(ExpertShape(kind, D, hidden), weights, moments), **settings)


def disk(folder: Path, given: StoreOptions | None = None, slots: int = 40, **more: Any) -> DiskExperts:
    store = Store.open(folder, given or options(), write=True)
    return DiskExperts(Pool(store, slots * store.record, threads=2), store, CONSTANTS, **more)


def in_memory(given: StoreOptions, layer: int) -> Experts:
    """The bank that a layer of a new store is."""
    shape = given.layout.shape
    bank = Experts(ExpertOptions(kind=shape.kind, hidden=shape.hidden, count=given.experts), shape.width)
    weights = torch.empty(given.experts, shape.parameters)
    for expert in range(given.experts):
        given.origin.fill(shape, layer, expert, weights[expert])
    first, down = shape.matrices(weights)
    with torch.no_grad():
        bank.first_matrix.copy_(first)
        bank.down_proj.copy_(down)
    return bank


def routed(tokens: int, seed: int, top_k: int = 2, among: int = E) -> tuple[Tensor, Tensor, Dispatch]:
    """Tokens, the weights of their choices, and the choices among the first experts, sorted."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, generator=draw)
    expert = torch.stack([torch.randperm(among, generator=draw)[:top_k] for _ in range(tokens)])
    weight = torch.rand(tokens, top_k, generator=draw)
    keep = torch.rand(tokens, top_k, generator=draw) > 0.1
    logits = torch.zeros(tokens, E)
    routing = Routing(weight, expert, keep, logits, logits, keep)
    return x, weight, sort_by_expert(routing)
