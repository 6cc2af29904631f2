"""Which oracle judges which router, with the random numbers that a router draws while training.

A router without an entry in ``ORACLES`` fails the tests that iterate ``ROUTERS``.

Shape legend: T tokens, E experts, K choices, D width.
"""

from collections.abc import Callable
from typing import Any

import reference as ref
import torch
from torch import Tensor, nn

from moesaic.model.routers import ROUTERS, Router, build_router
from moesaic.routing import Routing

Params = dict[str, Tensor]  # parameters and buffers of one router, float64


def _top_k(o: Any, p: Params, x: Tensor, draw: Tensor | None, training: bool) -> ref.Routed:
    return ref.top_k(x, p["weight"], p.get("bias"), o.top_k, o.score, o.softmax_after, o.renormalize)


def _noisy_top_k(o: Any, p: Params, x: Tensor, draw: Tensor | None, training: bool) -> ref.Routed:
    noise = (p["noise_weight"], p.get("noise_bias"))
    return ref.noisy_top_k(x, p["weight"], p.get("bias"), *noise, draw, o.top_k)


def _expert_choice(o: Any, p: Params, x: Tensor, draw: Tensor | None, training: bool) -> ref.Routed:
    oracle = ref.expert_choice if training else ref.top_k
    return oracle(x, p["weight"], p.get("bias"), o.top_k)


def _loss_free(o: Any, p: Params, x: Tensor, draw: Tensor | None, training: bool) -> ref.Routed:
    return ref.top_k(
        x,
        p["weight"],
        p.get("bias"),
        o.top_k,
        o.score,
        renormalize=o.renormalize,
        selection_bias_E=p["e_score_correction_bias"],
    )


def _smart(o: Any, p: Params, x: Tensor, draw: Tensor | None, training: bool) -> ref.Routed:
    return ref.smart(x, p["weight"], p.get("bias"), p["log_temperature"], draw, o.min_k, o.top_k, o.mass)


ORACLES: dict[str, Callable[[Any, Params, Tensor, Tensor | None, bool], ref.Routed]] = {
    "top_k": _top_k,
    "noisy_top_k": _noisy_top_k,
    "expert_choice": _expert_choice,
    "loss_free": _loss_free,
    "smart": _smart,
}


def draw(options: Any, tokens: int, width: int, experts: int, training: bool) -> Tensor | None:
    """The numbers the router will draw after the same seed: noise [T, E] or jitter [T, D]."""
    if training and options.kind == "noisy_top_k":
        return torch.randn(tokens, experts).double()
    if training and options.kind == "smart" and options.jitter > 0:
        return torch.empty(tokens, width).uniform_(1 - options.jitter, 1 + options.jitter).double()
    return None


def router_options(kind: str, top_k: int, bias: bool = False, **changed: Any) -> Any:
    if kind == "smart":
        changed = {"min_k": min(2, top_k), "mass": 0.6, "jitter": 0.2} | changed
    return ROUTERS[kind][0](top_k=top_k, bias=bias, **changed)


def randomise(module: nn.Module, seed: int, scale: float = 0.7) -> None:
    """Fill parameters and floating buffers; the draw does not depend on torch's global generator."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))


def random_router(options: Any, width: int, experts: int, seed: int = 0) -> Router:
    router = build_router(options, width, experts)
    randomise(router, seed)
    return router


def oracle_leaves(module: nn.Module) -> Params:
    """Float64 copies of a module's parameters (which collect gradients) and buffers."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    return leaves | {name: b.double() for name, b in module.named_buffers()}


def choices_of(routed: ref.Routed) -> list[list[int]]:
    return [list(gates) for gates in routed["weights"]]


def kept_weights(routing: Routing) -> list[dict[int, Tensor]]:
    """Per token: expert -> weight of the choices that are carried out, in the order of K."""
    return [
        {int(e): w for w, e, keep in zip(*row, strict=True) if keep}
        for row in zip(routing.weight_TK, routing.expert_TK, routing.keep_TK, strict=True)
    ]
