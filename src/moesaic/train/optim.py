"""Optimizers and learning-rate schedules.

Muon works on whole stacks of matrices at once: the experts of a layer, and matrices of one shape
across layers, are orthogonalised in one batched product.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from moesaic.config import Options
from moesaic.native import adamw, library
from moesaic.native.adamw import Scalars
from moesaic.offload.adamw import step as plain_step


class OptimOptions(Options):
    """One optimizer for all parameters, or Muon for the matrices and AdamW for the rest.

    ``lr`` is AdamW's or RMSProp's; ``matrix_lr`` is Muon's, for the matrices inside blocks (not
    embeddings, head, routers, norms or biases). ``decay`` applies weight decay to ``matrices``
    only (not stacked biases or taps of convolutions) or to ``all`` parameters, as OLMoE does. AdamW and
    Muon decouple the decay from the gradient; RMSProp adds it to the gradient, as PyTorch's does.
    ``momentum`` and ``ns_steps`` (the polynomials of ``orthogonalise``) are Muon's; RMSProp smooths with the
    second of ``betas``.
    """

    kind: Literal["adamw", "rmsprop", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    matrix_lr: float = Field(0.02, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    decay: Literal["matrices", "all"] = "matrices"
    momentum: float = Field(0.95, ge=0, lt=1)
    ns_steps: int = Field(4, ge=1, le=20)


class ScheduleOptions(Options):
    """The factor on every learning rate: linear warm-up over ``warmup`` steps (below 1: over that share of
    all), then ``kind``.

    ``cosine`` and ``linear`` fall to ``final`` at the last step; ``wsd`` stays at 1 and falls
    linearly over the last ``decay_fraction`` of the steps (warmup–stable–decay, arXiv 2404.06395).
    """

    kind: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup: float = Field(0, ge=0)
    final: float = Field(0.0, ge=0, le=1)
    decay_fraction: float = Field(0.2, gt=0, le=1)


def schedule_factor(options: ScheduleOptions, step: int, steps: int) -> float:
    """The factor for the update that makes step ``step`` (counted from 1) of ``steps``."""
    warmup = round(options.warmup if options.warmup >= 1 else options.warmup * steps)
    if step <= warmup:
        return step / warmup
    if options.kind == "constant":
        return 1.0
    start = warmup
    if options.kind == "wsd":
        start = max(start, round(steps * (1 - options.decay_fraction)))
    progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
    if options.kind == "cosine":
        return options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - (1.0 - options.final) * progress


class MasterAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for bfloat16 parameters, whose float32 values it keeps (``master``, as mixed
    precision has it: arXiv 1710.03740, section 3.1) and rounds to the nearest after each step. Gradients are
    taken times ``scale``, which clips them without a pass of its own."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.scale = 1.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "master" not in state:
            state["master"] = parameter.float()
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(state["master"])
            state["exp_avg_sq"] = torch.zeros_like(state["master"])
        state["step"] += 1
        (beta1, beta2), count = group["betas"], int(state["step"])
        scalars = Scalars(
            decay=1 - group["lr"] * group["weight_decay"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            rate=group["lr"] / (1 - beta1**count),
            root=math.sqrt(1 - beta2**count),
            scale=self.scale,
        )
        values = state["master"], state["exp_avg"], state["exp_avg_sq"]
        if parameter.device.type == "cpu" and library.available():
            adamw.master_step(parameter, gradient.contiguous(), *values, scalars)
        else:
            plain_step(*values, gradient.float(), scalars)
            parameter.copy_(state["master"])


def half(model: nn.Module) -> None:
    """Round the matrices of linear layers and embeddings to bfloat16, for ``MasterAdamW``. Routers, norms and
    stacks of experts stay as they are."""
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Embedding):
            module.weight.data = module.weight.data.bfloat16()


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all of them, a float32 scalar whatever their dtype."""
    norms = [_norm(gradient) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)


def _norm(gradient: Tensor) -> Tensor:
    if gradient.dtype == torch.bfloat16 and gradient.device.type == "cpu" and library.available():
        return torch.tensor(math.sqrt(adamw.squared_norm(gradient.contiguous())))
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    return norm


def clip(optimizers: Sequence[torch.optim.Optimizer], norm: Tensor, most: float) -> float:
    """Have the step that follows take gradients of this norm times at most ``most / norm``, as
    ``torch.nn.utils.clip_grads_with_norm_`` does; that factor."""
    factor = min(1.0, most / (float(norm) + 1e-6))
    for optimizer in optimizers:
        if isinstance(optimizer, MasterAdamW):
            optimizer.scale = factor
        else:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return factor


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/). A stack
    [E, out, in] is E matrices, each orthogonalised by itself. Weight decay is decoupled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 4,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape[-2:]].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer, grad = state["momentum_buffer"], parameter.grad
            assert grad is not None
            buffer.lerp_(grad, 1 - momentum)
            nesterov = grad.lerp(buffer, momentum)
            directions.append(nesterov.view(-1, *nesterov.shape[-2:]))
        update = orthogonalise(torch.cat(directions), group["ns_steps"])
        rows, columns = update.shape[-2:]
        # Tall matrices move further, so that each output changes alike (Jordan's post).
        rate = group["lr"] * max(1.0, rows / columns) ** 0.5
        parts = update.split([len(d) for d in directions])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(part.view_as(parameter), alpha=-rate)


def orthogonalise(stack: Tensor, steps: int = 4) -> Tensor:
    """The nearest semi-orthogonal matrix to each [out, in] of a stack, approximately, in its dtype.

    ``steps`` odd quintic polynomials of each matrix, in bfloat16, every one the best for what the one
    before it left (Amsel et al. 2025, Polar Express, arXiv 2505.16932, algorithm 1). Four of them bring
    singular values above a thousandth of the matrix's norm to 0.43–1.55 and are as good for the char recipe
    as five of Jordan's fixed ones; what matters is how far small singular values are lifted
    (docs/evidence.md).
    """
    x = stack.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT.contiguous() if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in sign_polynomials(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(stack.dtype)


@cache
def sign_polynomials(steps: int, least: float = 1e-3) -> list[tuple[float, float, float]]:
    """(a, b, c) of polynomials ax + bx³ + cx⁵ that one after the other bring [least, 1] towards 1.

    Each is the minimax polynomial on the interval that the last one left, found by exchange (Remez): it
    misses 1 by the same error, of alternating sign, at both ends and at its two turning points.
    """
    low, high, found = least, 1.0, []
    for _ in range(steps):
        turns = low + (high - low) * np.array([0.4, 0.8])
        for _ in range(30):
            points = np.array([low, *turns, high])
            system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], axis=1)
            a, b, c, error = np.linalg.solve(system, np.ones(4)).tolist()
            root = math.sqrt(max(0.0, 9 * b * b - 20 * a * c))
            turns = np.sqrt(np.array([-3 * b - root, -3 * b + root]) / (10 * c))
        low, high = 1 - error, 1 + error
        # bf16 rounds by up to 0.4 %, and beyond its interval a polynomial soon diverges: a margin of 1 %.
        found.append((a / 1.01, b / 1.01**3, c / 1.01**5))
        if error < 1e-3:  # all is 1 already: from here on, the iteration whose fixed point that is
            low, high = 1 - 1e-3, 1 + 1e-3
    return found


def build_optimizers(model: nn.Module, options: OptimOptions) -> list[torch.optim.Optimizer]:
    """The optimizers for the trainable parameters, each group marked with its ``base_lr``."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    rest = named
    if options.kind == "muon":
        matrices = [p for name, p in named if _for_muon(name, p)]
        rest = [(name, p) for name, p in named if not _for_muon(name, p)]
        if matrices:
            optimizers.append(
                Muon(matrices, options.matrix_lr, options.momentum, options.weight_decay, options.ns_steps)
            )
    decayed = [p for name, p in rest if options.decay == "all" or _is_matrix(name, p)]
    kept = [p for name, p in rest if not (options.decay == "all" or _is_matrix(name, p))]
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.kind == "rmsprop":
        optimizers.append(torch.optim.RMSprop(groups, options.lr, alpha=options.betas[1], eps=options.eps))
    else:
        whole, rounded = _divided(groups)
        if whole:
            optimizers.append(torch.optim.AdamW(whole, options.lr, options.betas, options.eps, fused=True))
        if rounded:
            optimizers.append(MasterAdamW(rounded, options.lr, options.betas, options.eps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to ``factor`` times its ``base_lr``."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All optimizer state as ``parameter name/state name`` to tensor."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Put back what ``optimizer_tensors`` took. Raises KeyError for a parameter that the model
    lacks or does not train."""
    parameters = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[name]
        if parameter not in owner:
            raise KeyError(name)
        if key == "master" and parameter.dtype == torch.float32:  # a machine that does not multiply bfloat16
            parameter.data.copy_(tensor)
            continue
        # A clone: what a checkpoint gives are maps of its files, which pruning will remove.
        owner[parameter].state[parameter][key] = tensor.to(parameter.device).clone()


def missing_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> str | None:
    """The name of a parameter whose optimizer has not the state, or not of the shape, that it keeps once it
    has made a step; None where all have."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        wanted = _STATE[type(optimizer)]
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            state = optimizer.state.get(parameter, {})
            shapes = {value.shape for key, value in state.items() if key != "step"}
            if set(state) != wanted or shapes != {parameter.shape}:
                return names[parameter]
    return None


_STATE: dict[type[torch.optim.Optimizer], set[str]] = {
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.RMSprop: {"step", "square_avg"},
    MasterAdamW: {"step", "master", "exp_avg", "exp_avg_sq"},
    Muon: {"momentum_buffer"},
}


def _divided(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the parameters that are float32, and of those that are bfloat16."""
    whole, rounded = (
        [{**g, "params": [p for p in g["params"] if (p.dtype == torch.bfloat16) == half]} for g in groups]
        for half in (False, True)
    )
    return [g for g in whole if g["params"]], [g for g in rounded if g["params"]]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Two dimensions or more; a stack of biases or of a convolution's taps is no matrix."""
    return parameter.ndim > 1 and not name.endswith(("up_bias", "down_bias", "conv.weight"))


def _for_muon(name: str, parameter: nn.Parameter) -> bool:
    """Matrices inside blocks; scores of experts (routers and shared gates) are AdamW's."""
    module = name.rpartition(".")[0]
    inside = ".layers." in f".{name}" and not module.endswith(("gate", "shared_expert_gate"))
    return inside and _is_matrix(name, parameter)
