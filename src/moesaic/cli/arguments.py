"""What several verbs take: overrides, a recipe, a model, a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.errors import RecipeError

if TYPE_CHECKING:
    from moesaic.train.recipe import Recipe

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A built-in name, a TOML file or a run directory.")
]
ModelDir = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="A run directory, a checkpoint, an export or a Hugging Face directory."
    ),
]
Prompt = Annotated[
    str, typer.Option("--prompt", "-p", help="The text to start from; - reads standard input.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def memory_of(words: Sequence[str]) -> int | None:
    """What ``offload.memory=2GiB`` says among the words of a verb that uses a model: bytes for experts that
    stay on disk, None where it is not said. Raises RecipeError for any other word."""
    from moesaic.config import validate
    from moesaic.offload.model import OffloadOptions, bytes_of

    memory = None
    for word in words:
        key, equals, value = word.partition("=")
        if key != "offload.memory" or not equals:
            raise RecipeError(f"{word}: is not understood; beside options there is offload.memory=2GiB alone")
        memory = bytes_of(str(validate(OffloadOptions, {"memory": value}, where=word).memory))
    return memory


def recipe_of(name: str, words: list[str], resume: bool = False) -> "Recipe":
    """The recipe that a verb was given, overrides written over it. Raises RecipeError."""
    from moesaic.train.recipe import load_recipe

    return load_recipe(name, words, resume=resume)
