"""LoRA (Hu et al. 2021, arXiv 2106.09685): train a low-rank change of some matrices, then add it to them.

It is applied to a finished model from outside, to linear layers and to stacked experts alike, every expert
with factors of its own.
"""

from fnmatch import fnmatchcase

import torch
from pydantic import Field
from torch import Tensor, nn

from moesaic.config import Options
from moesaic.errors import RecipeError
from moesaic.model.experts import Experts
from moesaic.model.low_rank import AdaptedLinear, ExpertAdapter


class LoRAOptions(Options):
    """W becomes W + alpha / rank · B A for every matrix that ``targets`` name by pattern, as parameters are
    named: ``*.self_attn.*_proj.weight`` is all of attention, ``*.mlp.experts.*`` all experts,
    ``*.mlp.experts.down_proj`` the last matrix of each. All else is frozen, but for what ``train.only``
    names."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: list[str] = Field(["*.self_attn.*_proj.weight", "*.mlp.experts.*"], min_length=1)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(model: nn.Module, options: LoRAOptions) -> None:
    """Give the matrices that ``options`` name their factors, in place; from torch's global generator.

    Raises RecipeError for a pattern that matches no matrix that can have them.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    able = {
        name: module
        for name, module in model.named_modules()
        # A head that is the embedding too would take the embedding along.
        if type(module) in (nn.Linear, Experts) and getattr(module, "weight", None) not in embeddings
    }
    places = [place for name, module in able.items() for place in _matrices(name, module)]
    for pattern in options.targets:
        if not any(fnmatchcase(place, pattern) for place in places):
            raise RecipeError(
                f"train.lora.targets: {pattern!r} matches no matrix of a linear layer or of experts; those "
                f"have names like {places[0]}"
            )
    chosen = {place for place in places if any(fnmatchcase(place, p) for p in options.targets)}
    for name, module in able.items():
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, Experts):
            first, down = (place in chosen for place in _matrices(name, module))
            if first or down:
                module.adapter = ExpertAdapter(
                    module.first_matrix if first else None,
                    module.down_proj if down else None,
                    options.rank,
                    options.scale,
                )
        elif isinstance(module, nn.Linear) and f"{name}.weight" in chosen:
            setattr(model.get_submodule(parent), leaf, AdaptedLinear(module, options.rank, options.scale))


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every change to its matrix and take the factors away; the model then computes the same, up to
    rounding, and is one without LoRA."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Experts) and module.adapter is not None:
            a1, b1, a2, b2 = module.adapter.matrices(torch.float32)
            for weight, a, b in ((module.first_matrix, a1, b1), (module.down_proj, a2, b2)):
                if a is not None and b is not None:
                    for matrix, a_rI, b_Or in zip(weight, a, b, strict=True):  # never a second stack
                        _add(matrix, a_rI, b_Or)
            module.adapter = None
        elif isinstance(module, AdaptedLinear):
            _add(module.weight, module.lora_a, module.lora_b * module.scale)
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)


def _add(matrix_OI: Tensor, a_rI: Tensor, b_Or: Tensor) -> None:
    matrix_OI.copy_(matrix_OI.float() + b_Or.float() @ a_rI.float())


def _matrices(name: str, module: nn.Module) -> list[str]:
    """The names of what can be changed of a module: the weight of a linear layer, both matrices of
    experts."""
    if not isinstance(module, Experts):
        return [f"{name}.weight"]
    first = "gate_up_proj" if module.kind == "swiglu" else "up_proj"
    return [f"{name}.{first}", f"{name}.down_proj"]
