"""What a run takes from the model that it starts from: weights, what belongs to it, perhaps the optimizer."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moesaic.errors import CheckpointError, RecipeError
from moesaic.lm import load
from moesaic.model.transformer import LanguageModel
from moesaic.offload.model import bytes_of, into_memory
from moesaic.train.optim import load_optimizer_tensors, missing_state
from moesaic.train.recipe import Recipe
from moesaic.weights.carried import TEMPLATE, carried_files
from moesaic.weights.checkpoint import newest_valid, read_checkpoint
from moesaic.weights.shards import real_file

_OPTIMIZER = "optimizer.safetensors"


@dataclass(frozen=True)
class Begun:
    """What is kept of the model that a run starts from, besides its weights."""

    path: Path
    stop_ids: frozenset[int]


def take_weights(model: LanguageModel, recipe: Recipe, in_bf16: bool) -> Begun:
    """Give ``model``, which has no storage yet, the weights of the model that the recipe starts from.

    All become float32, but for frozen experts that lie in bfloat16 where products are made in it: they would
    be rounded back to what they were for every product, and eight experts of SmolLM2-135M are 2.5 GB in
    float32. Raises RecipeError where the recipe makes another model of it."""
    if recipe.offload.memory is not None:  # experts of the store begin as those of its files (lm.experts_of)
        begun = load(str(recipe.start), as_stored=True, memory=bytes_of(recipe.offload.memory))
    else:
        begun = load(str(recipe.start), as_stored=True)
        into_memory(begun.model)
    if model.config.tied and not begun.config.tied:
        raise RecipeError(
            f"start = {recipe.start}: its embeddings and head are two matrices; leave model.tied out"
        )
    stored = begun.model.state_dict()
    if begun.config.tied and not model.config.tied:  # one matrix becomes two
        stored["lm_head.weight"] = stored["lm_head.weight"].clone()
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, tensor in stored.items():
        kept = in_bf16 and ".mlp.experts." in name and name not in trains and tensor.dtype == torch.bfloat16
        stored[name] = tensor if kept or not tensor.is_floating_point() else tensor.float()
    try:
        model.load_state_dict(stored, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise RecipeError(f"start = {recipe.start}: model.* makes another model of it: {reason}") from None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trains)
    if model.config.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return Begun(begun.path, begun.stop_ids)


def take_optimizer(model: LanguageModel, optimizers: list[torch.optim.Optimizer], start: str) -> None:
    """Give the optimizers the state that the run ``start`` left, as OLMoE's annealing went on with it.

    Raises RecipeError where there is none, or one of another optimizer or of other parameters."""
    path = Path(start).expanduser()
    try:
        checkpoint = path if (path / _OPTIMIZER).is_file() else newest_valid(path, lambda sentence: None)
        if checkpoint is None:
            raise RecipeError(
                f"start_optimizer: {start} holds no optimizer; give a run that has checkpoints, or set it "
                "to false"
            )
        load_optimizer_tensors(model, optimizers, read_checkpoint(checkpoint).tensors[_OPTIMIZER])
    except KeyError as error:
        raise RecipeError(f"start_optimizer: {start} trained other parameters ({error.args[0]})") from None
    except CheckpointError as error:
        raise CheckpointError(f"start_optimizer: {error}") from None
    if missing := missing_state(model, optimizers):
        raise RecipeError(
            f"start_optimizer: {start} has no such state of {missing}; train the same parameters with the "
            "same optim.kind, or set it to false"
        )


def carried_along(recipe: Recipe, begun: Begun | None) -> dict[str, bytes]:
    """What belongs to a model besides weights and tokenizer: its chat template above all."""
    files = {} if begun is None else carried_files(begun.path)
    template = None if recipe.data.template is None else Path(recipe.data.template).expanduser()
    if template is not None:
        files |= (
            carried_files(template) if template.is_dir() else {TEMPLATE: real_file(template).read_bytes()}
        )
    return files
