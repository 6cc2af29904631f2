"""What a merge is: the base, the experts, what they share, and how their router begins."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moesaic.config import Options, apply_overrides, parse_overrides, read_toml, validate
from moesaic.errors import RecipeError
from moesaic.merge.mergekit import read_mergekit
from moesaic.weights.carried import MERGE
from moesaic.weights.shards import real_file

_MOST_RECIPE = 2**20  # bytes

RouterMode = Literal["ridge", "ridge-unlabelled", "prompts", "random", "zero"]


class ExpertSource(Options):
    """A dense model, or a LoRA adapter of the base, and what tells the router about it: prompts that it
    should and should not get, and ``calibration``, files of text of its domain."""

    model: str = Field(min_length=1)
    positive: list[str] = Field([])
    negative: list[str] = Field([])
    calibration: list[str] = Field([])

    @field_validator("positive", "negative")
    @classmethod
    def _says_something(cls, prompts: list[str]) -> list[str]:
        if not all(prompt.strip() for prompt in prompts):
            raise ValueError("a prompt is empty; leave it out")
        return prompts

    @field_validator("calibration", mode="before")
    @classmethod
    def _one_file_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class RouterInit(Options):
    """How the router begins; ``auto`` is ``ridge`` where every expert has calibration text, ``prompts`` where
    every one has prompts, else ``random``.

    ``ridge`` weighs the squares of the weights against the mean square of the inputs, ``scale`` is the
    standard deviation that the fitted logits get, ``tokens`` is how much text of each expert is read in
    windows of ``seq_len``, and ``std`` is that of ``random``.
    """

    init: Literal["auto", "ridge", "ridge-unlabelled", "prompts", "random", "zero"] = "auto"
    ridge: float = Field(0.01, gt=0)
    scale: float = Field(1.0, gt=0)
    tokens: int = Field(8192, ge=1)
    seq_len: int = Field(256, ge=2)
    std: float = Field(0.02, gt=0)


class MergeOptions(Options):
    """One merge. ``shared`` says where everything but the feed-forward networks comes from: ``base``, the
    ``average`` of the experts, ``expert:NAME``, or ``auto``, the point between base and average where the
    loss on the calibration text is least. ``shared_expert`` is for Qwen2 alone, whose target always has one:
    ``null`` adds nothing, ``base`` is the base's own network at half weight. Without ``renormalize`` (Qwen2
    again, whose graph in llama.cpp does not) the weights of a token's experts are less than 1 in all, so the
    merge is not its donors until it has been trained."""

    base: str = Field(min_length=1)
    experts: dict[str, ExpertSource]
    top_k: int = Field(2, ge=1)
    shared: str = Field("base", pattern=r"^(base|average|auto|expert:.+)$")
    shared_expert: Literal["null", "base"] = "null"
    renormalize: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    seed: int = Field(1337, ge=0, lt=2**63)
    router: RouterInit = RouterInit()

    @field_validator("experts", mode="before")
    @classmethod
    def _a_directory_is_an_expert(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"model": v} if isinstance(v, str) else v for name, v in value.items()}

    @model_validator(mode="after")
    def _fits_together(self) -> "MergeOptions":
        names = list(self.experts)
        if len(names) < 2:
            raise ValueError(f"experts: a merge takes two or more, {len(names)} given")
        odd = [name for name in names if not name or not name.isprintable() or len(name) > 64]
        if odd:
            raise ValueError(f"experts: {odd[0]!r} is no name; use up to 64 printable characters")
        if self.top_k > len(names):
            raise ValueError(f"top_k = {self.top_k} is above the number of experts, {len(names)}")
        if self.shared.startswith("expert:") and self.shared.removeprefix("expert:") not in names:
            raise ValueError(f"shared = {self.shared!r}: the experts are {', '.join(names)}")
        if self.top_k == 1 and self.renormalize:
            raise ValueError(
                "top_k = 1 with renormalised weights: the one weight of a token is always 1, and no loss can "
                "train the router; use 2 or more"
            )
        return self

    def router_mode(self) -> RouterMode:
        """What ``router.init`` comes to. Raises RecipeError where it lacks what it needs."""
        init, experts = self.router.init, self.experts
        if init == "auto":
            init = "random"
            if all(expert.positive for expert in experts.values()):
                init = "prompts"
            if all(expert.calibration for expert in experts.values()):
                init = "ridge"
        needs = {"ridge": "calibration", "ridge-unlabelled": "calibration", "prompts": "positive"}.get(init)
        lacking = [name for name, expert in experts.items() if needs and not getattr(expert, needs)]
        if init == "ridge-unlabelled" and len(lacking) < len(experts):
            lacking = []  # a mixed file counts for all
        if lacking:
            what = (
                "calibration text (--calibration NAME=FILE)" if needs == "calibration" else "positive prompts"
            )
            raise RecipeError(f"router.init = {init}: {lacking[0]} has no {what}")
        if self.shared == "auto" and init in ("random", "zero", "prompts"):
            raise RecipeError(
                f"shared = auto measures the loss on calibration text with a router fitted to it, and "
                f"router.init = {init} has neither; give --calibration for each expert"
            )
        return init


def merge_options(
    recipe: Path | None,
    base: str | None,
    experts: list[str],
    calibration: list[str],
    overrides: list[str],
) -> MergeOptions:
    """Options from a TOML recipe or a mergekit-moe YAML file, the command line written over it.

    ``experts`` are ``NAME=DIR`` or ``DIR``, ``calibration`` ``NAME=FILE``. Raises RecipeError.
    """
    table: dict[str, Any] = {}
    where = "merge"
    if recipe is not None:
        where = str(recipe)
        yaml = recipe.suffix.lower() in (".yml", ".yaml")
        table = read_mergekit(recipe) if yaml else read_toml(recipe)
    if base is not None:
        table["base"] = base
    known = table.setdefault("experts", {})
    if not isinstance(known, dict):
        raise RecipeError(f"{where}: experts: should be a table of names, not {known!r}")
    for word in experts:
        name, equals, directory = word.partition("=")
        if not equals:
            name, directory = Path(word).name, word
        if name in known:
            raise RecipeError(f"--expert {word}: there is another expert {name!r}; give one of them a name")
        known[name] = {"model": directory}
    for word in calibration:
        name, equals, file = word.partition("=")
        expert = known.get(name)
        if not equals or not isinstance(expert, str | dict):
            raise RecipeError(f"--calibration {word}: write NAME=FILE with the name of an expert")
        if isinstance(expert, str):
            expert = known[name] = {"model": expert}
        before = expert.get("calibration", [])
        expert["calibration"] = [*([before] if isinstance(before, str) else before), file]
    if "base" not in table:
        raise RecipeError("--base DIR: say which dense model the experts were tuned from")
    return validate(MergeOptions, apply_overrides(table, parse_overrides(overrides)), where)


def recorded_options(directory: Path) -> MergeOptions | None:
    """The recipe that a merge, or what was trained from it, carries along; None where there is none. Raises
    RecipeError, CheckpointError."""
    path = next((p for p in (directory / MERGE, directory / "model" / MERGE) if os.path.lexists(p)), None)
    if path is None:
        return None
    if real_file(path).stat().st_size > _MOST_RECIPE:
        raise RecipeError(f"{path}: is too large to be a merge's recipe")
    return validate(MergeOptions, read_toml(path), str(path))
