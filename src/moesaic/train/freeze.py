"""Which parameters learn, by name pattern; experts on disk have names too."""

from collections import Counter
from fnmatch import fnmatchcase

from torch import nn

from moesaic.errors import RecipeError
from moesaic.offload.bank import OffloadedExperts
from moesaic.train.recipe import Recipe


def freeze(model: nn.Module, recipe: Recipe) -> None:
    """Freeze parameters by name pattern; with LoRA all but those that ``train.only`` names.

    Raises RecipeError for a pattern that matches nothing, when nothing is left to train, and where half of a
    bank on disk would be frozen.
    """
    named, banks = dict(model.named_parameters()), _banks(model)
    names = [*named, *(name for bank in banks for name in _names(*bank))]
    for key, patterns in (("train.freeze", recipe.train.freeze), ("train.only", recipe.train.only)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(f"{key}: {pattern!r} matches no parameter; names look like {names[0]}")
    for name, parameter in named.items():
        parameter.requires_grad_(_learns(name, recipe))
    for module, bank in banks:
        learn = {_learns(name, recipe) for name in _names(module, bank)}
        if len(learn) > 1:
            raise RecipeError(f"train.freeze, train.only: {module} is on disk; it learns as a whole or not")
        bank.trains = learn.pop()
    learning = any(p.requires_grad for p in named.values()) or any(bank.trains for _, bank in banks)
    if recipe.train.lora is None and not learning:
        raise RecipeError("train.freeze and train.only leave nothing to train")


def what_trains(model: nn.Module, recipe: Recipe) -> list[str]:
    """Where something is frozen: lines that say what is, layer numbers folded into ``*``."""
    if not (recipe.train.freeze or recipe.train.only or recipe.train.lora):
        return []
    kinds: Counter[tuple[str, bool]] = Counter()
    for name, parameter in model.named_parameters():
        kinds[_folded(name), parameter.requires_grad] += parameter.numel()
    for module, bank in _banks(model):
        kinds[_folded(f"{module} (on disk)"), bank.trains] += (
            bank.source.shape.parameters * bank.source.experts
        )
    learning = sum(count for (_, on), count in kinds.items() if on)
    rows = [f"  {'trains' if on else 'frozen'}  {name}  {count:,}" for (name, on), count in kinds.items()]
    return [f"trains {learning:,} of {sum(kinds.values()):,} parameters:", *rows]


def _learns(name: str, recipe: Recipe) -> bool:
    options = recipe.train
    if any(fnmatchcase(name, pattern) for pattern in options.freeze):
        return False
    if options.only or options.lora:
        return any(fnmatchcase(name, pattern) for pattern in options.only)
    return True


def _banks(model: nn.Module) -> list[tuple[str, OffloadedExperts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, OffloadedExperts)]


def _names(module: str, bank: OffloadedExperts) -> list[str]:
    """What its matrices are called in memory."""
    return [f"{module}.{'gate_up_proj' if bank.kind == 'swiglu' else 'up_proj'}", f"{module}.down_proj"]


def _folded(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
