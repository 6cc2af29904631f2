"""A recipe: the one table that says what a run is. It composes; each part lives with its owner."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moesaic.config import Options, apply_overrides, parse_overrides, read_toml, validate
from moesaic.data.corpora import DataOptions
from moesaic.errors import RecipeError
from moesaic.lm import described
from moesaic.model.config import ModelConfig
from moesaic.model.lora import LoRAOptions
from moesaic.model.routers import ROUTERS
from moesaic.offload.catch_up import check_betas
from moesaic.offload.model import OffloadOptions
from moesaic.train.curriculum import CurriculumOptions
from moesaic.train.objectives import LossOptions
from moesaic.train.optim import OptimOptions, ScheduleOptions
from moesaic.weights.checkpoint import CheckpointOptions


class TrainOptions(Options):
    """How long, in what pieces and in which precision.

    One step sees ``batch_size`` windows of ``seq_len`` tokens in ``accumulate`` equal parts. ``epochs``,
    where given, decides ``steps``: so often all conversations or pairs are seen, or as many tokens as the
    text has. ``precision = "auto"`` is bf16 where the processor multiplies it in hardware, else fp32.
    ``weights = "bf16"`` keeps matrices as they are multiplied, where precision is bf16: nothing is cast in a
    step, gradients are bfloat16 too, and AdamW has the float32 values; otherwise weights are float32.
    ``freeze`` names parameters by pattern
    (``model.layers.*.mlp.experts.*``); ``only`` trains nothing but what it names; ``lora`` trains low-rank
    changes (model/lora.py) and, of all else, what ``only`` names. ``on_nan`` says what
    a loss that is not finite does: ``stop`` the run, ``skip`` that batch, or ``rollback`` to the last
    checkpoint and pass over that batch.
    """

    steps: int = Field(1000, ge=1)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(16, ge=1)
    seq_len: int = Field(256, ge=1)
    accumulate: int = Field(1, ge=1)
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    weights: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    clip: float | None = Field(None, gt=0)
    log_every: int = Field(10, ge=1)
    freeze: list[str] = Field([])
    only: list[str] = Field([])
    lora: LoRAOptions | None = None
    on_nan: Literal["stop", "skip", "rollback"] = "stop"

    @model_validator(mode="after")
    def _divides(self) -> "TrainOptions":
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} does not divide by accumulate = {self.accumulate}"
            )
        if self.weights == "bf16" and self.accumulate > 1:
            raise ValueError(
                'weights = "bf16" has gradients in bfloat16, too coarse to sum the parts of a batch in; '
                "set accumulate to 1"
            )
        return self


class EvalOptions(Options):
    """Every ``every`` steps and at the end: the loss on the validation part, or on its first ``windows`` of
    each domain; before the end, a sample too.

    ``batch_size`` windows at once (default: as many as make 16,384 tokens), ``sample`` new tokens
    (0: no sample) after ``prompt`` (default: the first token of the validation part). ``tasks`` are
    lm-evaluation-harness's, ``local`` those that are read from files (name -> path), asked each time too with
    ``shots`` examples and at most ``limit`` questions of each.
    """

    every: int = Field(500, ge=1)
    windows: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    sample: int = Field(200, ge=0)
    prompt: str | None = Field(None, min_length=1)
    tasks: list[str] = Field([])
    local: dict[str, str] = Field({})
    shots: int | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _asks_something(self) -> "EvalOptions":
        if not self.tasks and not self.local and (self.shots, self.limit) != (None, None):
            raise ValueError("shots and limit are about tasks: give eval.tasks or eval.local too")
        return self


class Recipe(Options):
    """One run. ``out`` defaults to runs/NAME, or the next free runs/NAME-2 …"""

    name: str = Field("run", pattern=r"^[\w.-]+$")
    about: str = ""
    out: str | None = None
    seed: int = Field(1337, ge=0, lt=2**63)
    # A model to start from: a run, an export or a Hugging Face directory. Its settings are model's, its
    # tokenizer is data's, where this recipe does not say otherwise.
    start: str | None = None
    # Whether its optimizer goes on too, as in OLMoE's annealing; start is then a run, or a checkpoint of one.
    start_optimizer: bool = False
    tracker: Literal["none", "tensorboard", "mlflow"] = "none"
    data: DataOptions = DataOptions()
    model: ModelConfig = ModelConfig()
    train: TrainOptions = TrainOptions()
    optim: OptimOptions = OptimOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    loss: LossOptions = LossOptions()
    offload: OffloadOptions = OffloadOptions()
    curriculum: CurriculumOptions = CurriculumOptions()
    eval: EvalOptions = EvalOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()

    @field_validator("tracker", mode="before")
    @classmethod
    def _none_is_a_tracker(cls, value: Any) -> Any:
        # An override's none is no value, and here that has a name.
        return "none" if value is None else value

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if self.model.position == "learned" and self.train.seq_len > self.model.context:
            raise ValueError(
                f"train.seq_len = {self.train.seq_len} is above model.context = {self.model.context}, "
                "the number of learned positions; lower one or raise the other"
            )
        pairs = self.data.source == "preferences"
        if pairs != (self.loss.objective != "next_token"):
            raise ValueError(
                f"loss.objective = {self.loss.objective!r} and data.source = {self.data.source!r} do not go "
                "together: preferences need dpo, dpo_norm, ipo or kto, and these need preferences"
            )
        if pairs and self.model.dropout:
            raise ValueError("model.dropout: the reference has none, so preferences take none; set it to 0")
        if self.loss.objective == "kto" and self.train.batch_size // self.train.accumulate < 2:
            raise ValueError(
                "train.accumulate: kto measures an answer against the others of its part of the batch; leave "
                "two pairs or more in each"
            )
        if self.train.weights == "bf16" and self.optim.kind != "adamw":
            raise ValueError(
                'train.weights: with "bf16" AdamW has the float32 values; set optim.kind to adamw'
            )
        if self.offload.memory is not None and self.optim.kind != "adamw":
            raise ValueError("offload.memory: experts on disk are AdamW's; set optim.kind to adamw")
        if self.offload.memory is not None:
            check_betas(*self.optim.betas)
            if self.optim.lr * self.optim.weight_decay >= 1:
                raise ValueError("optim.lr times optim.weight_decay keeps nothing of a weight; lower one")
        if self.offload.memory is not None and self.train.lora is not None:
            raise ValueError("offload.memory and train.lora do not go together: experts on disk train whole")
        if self.start_optimizer and self.train.lora is not None:
            raise ValueError("start_optimizer and train.lora do not go together: factors begin anew")
        if (self.data.pack or self.data.document_mask) and self.model.conv:
            key = "pack" if self.data.pack else "document_mask"
            raise ValueError(f"data.{key}: model.conv looks across the borders of documents; set it to 0")
        router = self.model.router
        if self.model.moe_layers and router.top_k == 1 and router.weights_sum_to_one:
            raise ValueError(
                "model.router.top_k = 1 with renormalised weights: the one weight is always 1, so the "
                "language-model loss gives the router no gradient; use top_k = 2 or kind = 'top_k' "
                "without renormalize"
            )
        return self

    def bytes_per_parameter(self) -> int:
        """Of weights, gradients and one or two moments, all float32; at least: of what is frozen, only the
        weights."""
        if self.train.freeze or self.train.only or self.train.lora:
            return 4
        return 16 if self.optim.kind == "adamw" else 12


def builtin_recipes() -> dict[str, Path]:
    """Name to file of every recipe shipped in the package, sorted."""
    folder = resources.files("moesaic") / "recipes"
    return {
        Path(str(f)).stem: Path(str(f)) for f in sorted(folder.iterdir(), key=str) if f.name.endswith(".toml")
    }


def recipe_path(name: str) -> Path:
    """The file of a recipe given as a built-in name, a TOML file or a run directory."""
    path, builtin = Path(name), builtin_recipes()
    if name in builtin:  # also beside a file or folder of that name, which ./NAME means
        return builtin[name]
    if path.is_dir() and (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    if path.suffix == ".toml" or path.exists():
        return path
    raise RecipeError(f"{name!r} is no recipe: give {', '.join(builtin)}, a TOML file or a run directory")


def _forget_old_router(table: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Where an override chooses another kind of router, drop what the recipe says of its own kind and
    the new one does not know, so that routers are compared by one key."""
    model = table.get("model")
    router = model.get("router") if isinstance(model, dict) else None
    kind = dict(pairs).get("model.router.kind")
    if not isinstance(model, dict) or not isinstance(router, dict):
        return
    if kind in ROUTERS and kind != router.get("kind"):
        known = ROUTERS[kind][0].model_fields
        model["router"] = {key: value for key, value in router.items() if key in known}


def _forget_old_source(table: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Where an override chooses another source of data, or other files, drop what the recipe says for its own
    alone."""
    data, source = table.get("data"), dict(pairs).get("data.source")
    if isinstance(data, dict) and source is not None and source != data.get("source", "stdlib"):
        own = {"join", "pack", "template", "path", "weights", "field"}
        if source in ("instructions", "preferences", "curriculum"):
            own |= {"clean", "document_mask"}
        for key in [key for key in data if key in own or key.startswith("dataset")]:
            del data[key]
    elif isinstance(data, dict) and "data.path" in dict(pairs):  # shares of other domains
        data.pop("weights", None)


def _forget_epochs(table: dict[str, Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Where an override says how many steps, the recipe's epochs do not."""
    train, said = table.get("train"), dict(pairs)
    if isinstance(train, dict) and "train.steps" in said and "train.epochs" not in said:
        train.pop("epochs", None)


def _begin_from(table: dict[str, Any], start: str, has_tokenizer: bool) -> None:
    """Take what a recipe leaves open from the model that it starts from."""
    config, tokenizer = described(start)
    said = table.get("model")
    known = config.model_dump(mode="json", exclude_none=True)
    table["model"] = _over(known, said) if isinstance(said, dict) else known
    data = table.setdefault("data", {})
    if isinstance(data, dict) and "tokenizer" not in data and not has_tokenizer:
        if tokenizer is None:
            raise RecipeError(f"start = {start}: has no tokenizer.json; put the model's own there")
        data["tokenizer"] = str(tokenizer)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` written over ``below``, table by table."""
    merged = dict(below)
    for key, value in above.items():
        inner = merged.get(key)
        merged[key] = _over(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def load_recipe(name: str, overrides: Sequence[str] = (), *, resume: bool = False) -> Recipe:
    """Read, override and check a recipe. Raises RecipeError, a line per mistake.

    To ``resume`` a run directory means that run, wherever its recipe says it was.
    """
    path = recipe_path(name)
    pairs = parse_overrides(overrides)
    known = Path(dict(pairs).get("out", "")) / "recipe.toml"
    if resume and "out" in dict(pairs) and known.is_file():  # of that run, as it was resolved
        path = known
    table: dict[str, Any] = read_toml(path)
    table.setdefault("name", path.stem)
    if resume and path == Path(name) / "recipe.toml":
        table["out"] = name
    start = dict(pairs).get("start", table.get("start"))
    if isinstance(start, str) and not resume:
        _begin_from(table, start, "data.tokenizer" in dict(pairs))
    _forget_old_router(table, pairs)
    _forget_old_source(table, pairs)
    _forget_epochs(table, pairs)
    table = apply_overrides(table, pairs)
    return validate(Recipe, table, where=path.stem if path.parent.name == "recipes" else str(path))
