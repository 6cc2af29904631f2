"""Everything a run is made of, built from its recipe: data, model, optimizers, objective."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from moesaic.analysis.harness import Suite
from moesaic.data.corpora import cache_folder
from moesaic.data.preferences import PreferenceStore
from moesaic.data.pretrain import prepare
from moesaic.data.store import Store
from moesaic.errors import CheckpointError, DataError, RecipeError, ResourceError
from moesaic.files import human_size
from moesaic.lm import LM, experts_of
from moesaic.machine import keep_freed_memory, multiplies_bf16, total_memory
from moesaic.model.config import ModelConfig
from moesaic.model.lora import add_lora
from moesaic.model.transformer import LanguageModel
from moesaic.offload.catch_up import AdamW, History
from moesaic.offload.experts import DiskExperts
from moesaic.offload.model import FOLDER, about, build_on_disk, index_tensors
from moesaic.offload.store import INDEX, Index
from moesaic.train.curriculum import Curriculum, CurriculumOptions
from moesaic.train.freeze import freeze, what_trains
from moesaic.train.objectives import Batch, Objective, objective_of
from moesaic.train.optim import build_optimizers, half, load_optimizer_tensors, optimizer_tensors
from moesaic.train.recipe import Recipe
from moesaic.train.references import add_reference
from moesaic.train.start import carried_along, take_optimizer, take_weights
from moesaic.weights.checkpoint import read_checkpoint
from moesaic.weights.contents import Contents
from moesaic.weights.indexes import indexes


@dataclass
class Progress:
    """Where a run is. ``passed_over`` are steps whose batch made the loss not finite."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    passed_over: list[int] = field(default_factory=list)


@dataclass
class Session:
    """One run in memory. All randomness is a pure function of (seed, step)."""

    recipe: Recipe
    store: Store
    model: LanguageModel
    optimizers: list[torch.optim.Optimizer]
    objective: Objective
    device: str
    trainable: list[nn.Parameter]
    carried: dict[str, bytes] = field(default_factory=dict)  # from the model it started from: chat template …
    stop_ids: frozenset[int] = frozenset()
    experts: DiskExperts | None = None
    curriculum: Curriculum = field(default_factory=lambda: Curriculum(CurriculumOptions(), [], 0))
    run: Path | None = None

    @property
    def bf16(self) -> bool:
        """Whether matrix products run in bfloat16."""
        return _in_bf16(self.recipe, self.device)

    def precision(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.bf16:
            return torch.autocast(self.device, torch.bfloat16)
        return nullcontext()

    def micro_batches(self, step: int) -> list[Batch]:
        """The batch of ``step`` in ``accumulate`` equal parts; pairs stay together."""
        options = self.recipe.train
        domain = self.curriculum.domain()
        turn = step if domain is None else self.curriculum.turn()
        windows = self.store.batch(self.recipe.seed, turn, options.batch_size, options.seq_len, domain)
        return [part.to(self.device) for part in Batch(*windows).split(options.accumulate)]

    def suite(self) -> Suite:
        """The tasks that are asked at each evaluation, if any."""
        asked = self.recipe.eval
        files = {name: Path(path).expanduser() for name, path in asked.local.items()}
        return Suite(asked.tasks, files, asked.shots, asked.limit)

    def lm(self) -> LM:
        """The model as it is now, as one that has been opened."""
        return LM(self.model.config, self.model, self.store.tokenizer, Path(self.recipe.name), self.stop_ids)

    def eval_batch_size(self) -> int:
        return self.recipe.eval.batch_size or max(1, 16_384 // self.recipe.train.seq_len)

    def contents(self, progress: Progress) -> Contents:
        """What a checkpoint holds: all that resuming needs, and all that using the model needs."""
        exported = self.exported(progress.step)
        exported.tensors["optimizer.safetensors"] = optimizer_tensors(self.model, self.optimizers)
        exported.json["state.json"] = vars(progress)
        if self.recipe.curriculum.order != "mixed":
            exported.json["curriculum.json"] = self.curriculum.state()
        exported.json["data.json"] = {"tokens": self.store.fingerprint}
        return exported

    def saved(self) -> None:
        """Say that what the session is now has been saved; places on disk that no checkpoint refers to are
        free."""
        if self.experts is not None and self.run is not None:
            self.experts.store.committed(indexes(self.run).values())

    def memory(self) -> list[str]:
        """Where experts are on disk: what the model is made of, and what of it is in memory."""
        if self.experts is None:
            return []
        pool, store = self.experts.pool, self.experts.store
        experts = f"{pool.slots:,} of {store.layers * store.experts:,} experts ({human_size(pool.memory)}"
        parts = ", ".join(f"{name} {count:,}" for name, count in self.model.config.parts().items())
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        state = sum(p.numel() * (12 if p.element_size() == 2 else 8) for p in self.trainable)
        gradients = sum(p.numel() * p.element_size() for p in self.trainable)
        direct = "direct I/O" if store.direct else "no direct I/O here, so that the page cache holds them too"
        return [
            f"parameters: {parts}",
            f"in memory: {experts}, {direct}); always {human_size(weights)} of other weights, "
            f"{human_size(gradients)} of gradients, {human_size(state)} of AdamW; and what a batch takes",
        ]

    def close(self) -> None:
        """Give back what experts on disk hold: files, threads, the lock."""
        if self.experts is not None:
            self.experts.close()

    def exported(self, step: int) -> Contents:
        """What using the model needs."""
        config = self.model.config.model_dump(mode="json", exclude_none=True)
        tensors = dict(self.model.state_dict())
        if self.model.config.tied:  # one tensor, stored once
            del tensors["lm_head.weight"]
        on_disk: dict[str, dict[str, Tensor]] = {}
        if self.experts is not None:
            self.experts.pool.write_back()
            on_disk = {INDEX: index_tensors(self.experts)}
        return Contents(
            tensors={"model.safetensors": tensors, **on_disk},
            json={
                "moesaic.json": {
                    "format": 1,
                    "step": step,
                    "model": config,
                    **({} if self.experts is None else {"offload": about(self.experts)}),
                    **({"stop_ids": sorted(self.stop_ids)} if self.stop_ids else {}),
                    **({"lora": lora.model_dump(mode="json")} if (lora := self.recipe.train.lora) else {}),
                }
            },
            files={
                **self.carried,
                "tokenizer.json": self.store.tokenizer.library.to_str(pretty=True).encode(),
            },
        )

    def restore(self, directory: Path) -> Progress:
        """Take model, optimizers and progress from a checkpoint directory, verified."""
        contents = read_checkpoint(directory)
        if contents.json.get("data.json") != {"tokens": self.store.fingerprint}:
            raise CheckpointError(
                f"{directory}: data.* gives another text, split or tokenizer now than when this run began "
                "(a file changed, or Python's own library did); bring it back, or start anew elsewhere"
            )
        try:
            tensors = dict(contents.tensors["model.safetensors"])
            if self.model.config.tied:
                tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
            self.model.load_state_dict(tensors)
            load_optimizer_tensors(self.model, self.optimizers, contents.tensors["optimizer.safetensors"])
            if self.experts is not None:
                self._restore_experts(contents.tensors[INDEX])
            if self.recipe.curriculum.order != "mixed":
                self.curriculum.restore(contents.json["curriculum.json"])
            return Progress(**contents.json["state.json"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{directory}: is not a checkpoint of this recipe ({reason})") from None

    def _restore_experts(self, tensors: dict[str, Tensor]) -> None:
        """Have the store be as a checkpoint says, and no checkpoint's experts be written over."""
        assert self.experts is not None
        assert self.run is not None
        self.experts.pool.forget()
        self.experts.store.go_back(Index.of(tensors), indexes(self.run).values())
        self.experts.history = History(self.experts.history.constants, tensors["rates"].tolist())


def build_session(
    recipe: Recipe,
    say: Callable[[str], None],
    stopped: Callable[[], bool] = lambda: False,
    run: Path | None = None,
) -> Session:
    """Prepare the data, then build and seed the model; prints what trains through ``say``. Raises Stopped
    once ``stopped`` says so while text is prepared. ``run`` is where experts on disk are kept."""
    keep_freed_memory()
    if recipe.start is None:
        _check_needs_no_model(recipe)
    _device(recipe)  # refused before anything is prepared
    store = prepare(recipe.data, seq_len=recipe.train.seq_len, progress=say, stopped=stopped)
    recipe = _with_steps(recipe, store)
    # A corpus shorter than the window is refused here, not after the model has been built.
    for domain in [None] if recipe.curriculum.order == "mixed" else store.domains:
        try:
            store.batch(recipe.seed, 1, 1, recipe.train.seq_len, domain)
        except DataError as error:
            raise DataError(f"domain {domain}: {error}" if domain else str(error)) from None
    next(store.validation(1, recipe.train.seq_len))
    for note in store.notes:
        say(note)
    vocabulary = recipe.model.vocab_size or store.tokenizer.vocab_size
    if vocabulary < store.tokenizer.vocab_size:
        raise RecipeError(
            f"model.vocab_size = {vocabulary} is below the tokenizer's {store.tokenizer.vocab_size}; "
            "leave the key out to take the tokenizer's"
        )
    if recipe.eval.prompt is not None:  # better refused here than at the first sample
        store.tokenizer.encode(recipe.eval.prompt)
    config = recipe.model.model_copy(update={"vocab_size": vocabulary})
    with ExitStack() as undo:
        session = _with_model(recipe, store, config, run, say, undo)
        if recipe.eval.tasks or recipe.eval.local:
            session.suite().check()
        if isinstance(store, PreferenceStore):  # the reference is the model as it is now
            add_reference(
                store, session.model, cache_folder(recipe.data), session.precision, session.bf16, say
            )
        undo.pop_all()
    return session


def _with_model(
    recipe: Recipe,
    store: Store,
    config: ModelConfig,
    run: Path | None,
    say: Callable[[str], None],
    undo: ExitStack,
) -> Session:
    """The session of a new model, or of the one that the recipe starts from. ``undo`` closes experts on disk
    where something after them cannot be built."""
    device = _device(recipe)
    torch.manual_seed(recipe.seed)
    experts: DiskExperts | None = None
    if recipe.offload.memory is not None:
        model, experts = _on_disk(config, recipe, device, run)
        undo.callback(experts.close)
    else:
        _check_memory(config, recipe, device)
        with torch.device("cpu" if recipe.start is None else "meta"):
            model = LanguageModel(config)
    freeze(model, recipe)
    begun = None if recipe.start is None else take_weights(model, recipe, _in_bf16(recipe, device))
    if recipe.train.lora is not None:
        add_lora(model, recipe.train.lora)
    model.to(device)
    if recipe.train.weights == "bf16" and _in_bf16(recipe, device):
        half(model)
    for line in what_trains(model, recipe):
        say(line)
    optimizers = build_optimizers(model, recipe.optim)
    resumes = run is not None and any((run / "checkpoints").glob("step-*"))
    if recipe.start_optimizer and not resumes:
        take_optimizer(model, optimizers, str(recipe.start))
    return Session(
        recipe=recipe,
        store=store,
        model=model,
        optimizers=optimizers,
        objective=objective_of(recipe.loss),
        device=device,
        trainable=[p for p in model.parameters() if p.requires_grad],
        carried=carried_along(recipe, begun),
        stop_ids=frozenset() if begun is None else begun.stop_ids,
        experts=experts,
        run=run,
        curriculum=Curriculum(recipe.curriculum, store.domains, recipe.seed),
    )


def _on_disk(
    config: ModelConfig, recipe: Recipe, device: str, run: Path | None
) -> tuple[LanguageModel, DiskExperts]:
    """A model with its experts in the run's directory, new or begun from another."""
    if device != "cpu" or run is None:
        raise RecipeError("offload.memory: experts on disk are trained on the CPU; set train.device to cpu")
    constants = AdamW(*recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay)
    origin = None if recipe.start is None else experts_of(recipe.start, config)
    model, experts = build_on_disk(config, recipe.offload, constants, recipe.seed, run / FOLDER, origin)
    experts.store.committed(indexes(run).values())
    return model, experts


def _check_needs_no_model(recipe: Recipe) -> None:
    """Refuse what only means something for a model that exists."""
    if recipe.data.source == "preferences":
        raise RecipeError("preferences are learnt by a model that exists, their reference: say start = MODEL")
    if recipe.train.lora is not None:
        raise RecipeError("train.lora changes a model that exists: say start = MODEL")
    if recipe.start_optimizer:
        raise RecipeError("start_optimizer is that of a run that exists: say start = RUN")


def _with_steps(recipe: Recipe, store: Store) -> Recipe:
    """The recipe with as many steps as its epochs take, where it counts in epochs."""
    options = recipe.train
    if options.epochs is None:
        return recipe
    rows = store.rows_per_epoch(recipe.seed, options.seq_len)
    steps = max(1, math.ceil(options.epochs * rows / options.batch_size))
    return recipe.model_copy(update={"train": options.model_copy(update={"steps": steps})})


def _in_bf16(recipe: Recipe, device: str) -> bool:
    """Whether matrix products run in bfloat16."""
    wanted = recipe.train.precision
    return wanted == "bf16" or (wanted == "auto" and multiplies_bf16(device))


def _check_memory(config: ModelConfig, recipe: Recipe, device: str) -> None:
    """Refuse a model that cannot fit: Linux promises memory it lacks, and kills whoever then uses it."""
    memory = total_memory()
    if device != "cpu" or memory is None:
        return
    needed = recipe.bytes_per_parameter() * config.parameters().total
    if needed > memory:
        raise ResourceError(
            f"training this model takes at least {human_size(needed)} of memory and this machine has "
            f"{human_size(memory)}; make model.width, model.layers or model.experts smaller"
        )


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """The seed of dropout, router noise and jitter in one part of one step."""
    return int(np.random.SeedSequence([seed, step, part]).generate_state(1, np.uint64)[0] >> 1)


def _device(recipe: Recipe) -> str:
    wanted = recipe.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RecipeError("train.device = 'cuda', but PyTorch sees no CUDA device here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
