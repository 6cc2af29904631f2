"""The one training loop."""

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moesaic.analysis.evaluate import Evaluation, evaluate
from moesaic.analysis.plots import load_heatmap, loss_curve, specialisation_heatmap
from moesaic.analysis.routing import neighbours_summed, specialisation, summarise_load
from moesaic.data.preferences import PreferenceStore
from moesaic.errors import DataError, DivergedError, RecipeError, ResourceError, Stopped
from moesaic.files import RunLock, explained
from moesaic.generate import SampleOptions, stream
from moesaic.machine import give_back_freed_memory
from moesaic.train.interrupt import Interrupt
from moesaic.train.logger import Logger
from moesaic.train.meter import Meter
from moesaic.train.objectives import Batch, Loss
from moesaic.train.optim import clip, gradient_norm, schedule_factor, set_learning_rate
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import check_same_run, choose_directory, create, read_rows, stored_recipe
from moesaic.train.session import Progress, Session, build_session, step_seed
from moesaic.weights.checkpoint import newest_valid, save, write_checkpoint

# A run that must pass over more batches than this is not having bad luck.
_MOST_PASSED_OVER = 20
# Steps with experts on disk, whose memory is promised, after which what was freed goes back to the system:
# glibc leaves more holes from step to step (arche-7b: 70 MB each), and the step after pays for new pages.
_GIVE_BACK_EVERY = 8


def train(recipe: Recipe, *, resume: bool = False, console: Console | None = None) -> Path:
    """Run a recipe to its end and return the run directory.

    Raises Stopped after SIGINT or SIGTERM with everything saved, DivergedError at a loss that is
    not finite (see ``train.on_nan``), and the errors of each part for bad input. Resuming repeats
    nothing and changes nothing: on CPU the weights are bit-identical to an undisturbed run's.
    """
    run = choose_directory(recipe, resume)
    if resume:
        check_same_run(stored_recipe(run), recipe, run)
    _make_directory(run)
    with RunLock(run), Interrupt() as interrupt:
        log, finished = Logger(run, recipe, console), False
        try:
            session = build_session(recipe, log.say, lambda: interrupt.requested, run)
            with closing(session):
                recipe = log.recipe = session.recipe  # whose epochs have become steps
                create(run, recipe)  # only now: bad data leaves no half-made run behind
                progress = _start(session, run, log)
                log.start_tracker(progress.step)
                _loop(session, progress, run, log, interrupt)
                _finish(session, progress, run, log)
            finished = True
        finally:
            log.close(finished)
    return run


def run(name: str, overrides: Sequence[str] = (), *, resume: bool = False) -> Path:
    """Train a built-in recipe, a TOML file or a run directory by name; ``overrides`` are ``a.b=c``."""
    return train(load_recipe(name, overrides, resume=resume), resume=resume)


def _loop(session: Session, progress: Progress, run: Path, log: Logger, interrupt: Interrupt) -> None:
    recipe, options = session.recipe, session.recipe.train
    meter = Meter()
    session.model.train()
    while progress.step < options.steps:
        step = progress.step + 1
        started = time.perf_counter()

        stage = None  # of the curriculum, that has ended with this step
        # ---- one step ---------------------------------------------------------------------------
        if step not in progress.passed_over:
            set_learning_rate(session.optimizers, schedule_factor(recipe.schedule, step, options.steps))
            loss, norm = train_step(session, step)
            if norm is None:
                progress = _not_finite(session, progress, step, loss, run, log)
                meter = Meter()
                continue
            meter.add(loss, norm, time.perf_counter() - started)
            stage = session.curriculum.after_step(_mean_loss(loss))
            if log.due(step):
                log.progress(step, *meter.now(session))
        else:
            session.curriculum.pass_over()
        progress.step = step
        progress.tokens += options.batch_size * options.seq_len
        progress.seconds += time.perf_counter() - started
        # -----------------------------------------------------------------------------------------

        last = step == options.steps
        if meter.losses and (step % options.log_every == 0 or last):
            log.row(meter.row(session, progress))
            meter = Meter()
        if step % recipe.eval.every == 0 or last:
            _evaluate(session, progress, log)
        if stage is not None:
            log.row({"step": step, "split": "stage", **stage})
            losses = f"loss {stage['first']:.3f} at first, now {stage['recent']:.3f}"
            log.say(f"step {step}: {stage['domain']}: {losses}")
        if step % recipe.checkpoint.every == 0 or last or interrupt.requested or stage is not None:
            _save(session, progress, run, log)
        if interrupt.requested and not last:
            raise Stopped(f"stopped after step {step} and saved; continue with: moesaic train {run} --resume")


def train_step(session: Session, step: int) -> tuple[list[Loss], float | None]:
    """Forward, backward and update; the gradient's norm, or None where something is not finite.

    Nothing is updated then, so the weights are still those of the step before.
    """
    options = session.recipe.train
    losses = []
    for part, batch in enumerate(session.micro_batches(step)):
        torch.manual_seed(step_seed(session.recipe.seed, step, part))
        with session.precision():
            loss = session.objective(session.model, batch)
        losses.append(loss)
        if not torch.isfinite(loss.total):
            _clear_gradients(session)
            return losses, None
        (loss.total / options.accumulate).backward()
    gradients = [p.grad for p in session.trainable if p.grad is not None]
    norm = gradient_norm(gradients)
    factors = [] if session.experts is None else session.experts.take_factors()
    if factors:  # gradients of experts on disk, which are never made as a whole
        norm = (norm.square() + sum(part.squared_norm() for _, part in factors)).sqrt()
    if not torch.isfinite(norm):
        _clear_gradients(session)
        return losses, None
    scale = 1.0
    if options.clip is not None:
        scale = clip(session.optimizers, norm, options.clip)
    for optimizer in session.optimizers:
        optimizer.step()
    if session.experts is not None:
        rate = session.recipe.optim.lr * schedule_factor(session.recipe.schedule, step, options.steps)
        session.experts.update(factors, rate, scale)
        if step % _GIVE_BACK_EVERY == 0:
            give_back_freed_memory()
    _clear_gradients(session)
    _after_step(session, losses)
    return losses, float(norm)


def _mean_loss(losses: list[Loss]) -> float:
    return float(torch.stack([loss.parts["main"] for loss in losses]).mean())


def _after_step(session: Session, losses: list[Loss]) -> None:
    """Tell each router that follows the load what its experts were asked for in the whole batch."""
    for index, layer in enumerate(session.model.moe_modules()):
        if not layer.gate.follows_load or not layer.gate.weight.requires_grad:
            continue  # a frozen router's bias rests too
        routings = [loss.routings[index] for loss in losses]
        layer.gate.after_step(torch.stack([r.counts_E(wanted=True) for r in routings]).sum(0))


def _clear_gradients(session: Session) -> None:
    for optimizer in session.optimizers:
        optimizer.zero_grad(set_to_none=True)
    if session.experts is not None:
        session.experts.take_factors()


def _not_finite(
    session: Session, progress: Progress, step: int, losses: list[Loss], run: Path, log: Logger
) -> Progress:
    """What ``train.on_nan`` says: raise, pass over this batch, or go back and pass over it."""
    value = losses[-1].total.item()
    what = (
        f"step {step}: the loss or its gradient is not finite (loss {value}, part {len(losses)} of the batch)"
    )
    policy = session.recipe.train.on_nan
    if policy == "stop":
        mend = "start again with a lower optim.lr or a train.clip"
        if progress.step > 0:  # the weights of the step before are whole: keep them
            _save(session, progress, run, log)
            mend = f"pass over this batch with: moesaic train {run} --resume train.on_nan=skip; or {mend}"
        raise DivergedError(f"{what}; {mend}")
    if len(progress.passed_over) >= _MOST_PASSED_OVER:
        raise DivergedError(f"{what}; {_MOST_PASSED_OVER} batches were passed over before it")
    passed_over = [*progress.passed_over, step]
    if policy == "rollback":
        checkpoint = newest_valid(run, log.say)
        if checkpoint is None:
            raise DivergedError(f"{what}; there is no checkpoint yet to roll back to")
        progress = session.restore(checkpoint)
        log.cut(progress.step)
        log.say(f"{what}; rolled back to step {progress.step}, will pass over that batch")
    else:
        log.say(f"{what}; passed over")
    progress.passed_over = passed_over
    log.row(
        {"step": step, "split": "skipped", "loss": None, "tokens": progress.tokens, "time": progress.seconds}
    )
    return progress


def _evaluate(session: Session, progress: Progress, log: Logger) -> Evaluation:
    started = time.perf_counter()
    seq_len = session.recipe.train.seq_len
    size, most = session.eval_batch_size(), session.recipe.eval.windows
    result = evaluate(session.model, session.store, size, seq_len, session.precision, most)
    if session.experts is not None:
        give_back_freed_memory()
    progress.seconds += time.perf_counter() - started
    row: dict[str, Any] = {
        "step": progress.step,
        "split": "val",
        "loss": result.loss,
        "tokens": progress.tokens,
        "time": progress.seconds,
    }
    said = f"step {progress.step}: held-out loss {result.loss:.4f} after {progress.seconds:.1f} s"
    if len(result.domains) > 1:
        row |= {f"loss/{d.domain}": d.loss for d in result.domains}
        row |= {f"bits_per_byte/{d.domain}": d.bits_per_byte for d in result.domains}
        said += "  (" + ", ".join(f"{d.domain} {d.loss:.3f}" for d in result.domains) + ")"
    if session.model.config.moe_layers:
        load = summarise_load(result.counts_LE())
        row |= {"balance": load.balance, "dead": load.dead_share, "load_entropy": load.entropy}
        summed = {d.domain: neighbours_summed(d.counts_LE) for d in result.domains}
        counts = {domain: counts_LE.tolist() for domain, (counts_LE, _) in summed.items()}
        size = next(iter(summed.values()))[1]
        layers = session.model.config.moe_layers
        log.load({"step": progress.step, "layers": layers, "experts_per_count": size, "counts": counts})
    if isinstance(session.store, PreferenceStore):
        pairs = evaluate_pairs(session, session.store)
        row |= {f"pairs_{name}": value for name, value in pairs.items()}
        shown = ", ".join(f"{name} {pairs[name]:.4f}" for name in ("main", "accuracy", "margin"))
        said = f"{said}; held-out pairs: {shown.replace('main', 'loss')}"
    log.row(row)
    log.say(said)
    _ask(session, progress, log)
    if session.recipe.eval.sample and progress.step < session.recipe.train.steps:
        log.say(_indent(sample_text(session, session.recipe.eval.sample)))
    return result


def _ask(session: Session, progress: Progress, log: Logger) -> None:
    """Ask the tasks of ``eval``, and write a row of task/metric. A run does not end because a question could
    not be fetched."""
    if not (session.recipe.eval.tasks or session.recipe.eval.local):
        return
    was_training = session.model.training
    try:
        with session.precision():
            results = session.suite().run(session.lm(), log.say)
    except DataError as error:
        log.say(f"eval.tasks: not asked at step {progress.step}: {error}")
        return
    finally:
        session.model.train(was_training)
    found = {
        f"{task}/{metric}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if "stderr" not in metric and metric != "samples"
    }
    now = {"step": progress.step, "split": "tasks", "tokens": progress.tokens, "time": progress.seconds}
    log.row({**now, **found})
    log.say("    " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))


@torch.no_grad()
def evaluate_pairs(session: Session, store: PreferenceStore) -> dict[str, float]:
    """The parts of the objective over all held-out pairs, each pair weighing the same."""
    total = len(store.pairs["val"])
    size = max(1, session.eval_batch_size() // 2)
    sums: dict[str, float] = {}
    session.model.eval()
    for start in range(0, total, size):
        numbers = list(range(start, min(total, start + size)))
        with session.precision():
            parts = session.objective(
                session.model, Batch(*store.windows("val", numbers)).to(session.device)
            ).parts
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(numbers)
    session.model.train()
    return {name: value / total for name, value in sums.items()}


def sample_text(session: Session, tokens: int) -> str:
    """A sample after ``eval.prompt`` (by default the first token of the validation part)."""
    tokenizer, prompt = session.store.tokenizer, session.recipe.eval.prompt
    if prompt is not None:
        ids = torch.tensor([tokenizer.encode(prompt).tolist()], device=session.device)
    else:
        first = next(iter(session.store.validation(1, 1))).ids_BT
        ids = first[:1].to(session.device)
    options = SampleOptions(temperature=0.8, seed=session.recipe.seed)
    with session.precision():
        new = [int(token) for token in stream(session.model, ids, tokens, options)]
    return tokenizer.decode([*ids[0].tolist(), *new])


def _start(session: Session, run: Path, log: Logger) -> Progress:
    """Go to the newest valid checkpoint, and cut the logs back to it."""
    checkpoint = newest_valid(run, log.say)
    progress = Progress() if checkpoint is None else session.restore(checkpoint)
    log.cut(progress.step)
    counts = session.model.config.parameters()
    size = f"{counts.total:,} parameters, {counts.active:,} active per token"
    if checkpoint is not None:
        log.say(f"{run}: continues at step {progress.step} of {session.recipe.train.steps}; {size}")
    else:
        log.say(f"{run}: {size}; {session.store.train_tokens:,} training tokens")
    for line in session.memory():
        log.say(line)
    return progress


def _save(session: Session, progress: Progress, run: Path, log: Logger) -> None:
    try:
        save(run, progress.step, session.contents(progress), session.recipe.checkpoint.keep)
        session.saved()
    except ResourceError as error:
        raise ResourceError(f"step {progress.step} could not be saved: {error}") from None


def _finish(session: Session, progress: Progress, run: Path, log: Logger) -> None:
    """The exportable model and the pictures."""
    write_checkpoint(run / "model", session.exported(progress.step))
    session.saved()
    with explained(run, f"the pictures of {run} cannot be written", "its model is whole"):
        _draw(run, run / "plots")


def _draw(run: Path, plots: Path) -> None:
    plots.mkdir(exist_ok=True)
    rows = read_rows(run / "metrics.jsonl")
    split = {name: [r for r in rows if r["split"] == name] for name in ("train", "val")}
    loss_curve(split["train"], split["val"], plots / "loss.png")
    loads = read_rows(run / "load.jsonl")
    if loads:
        layers, counts = loads[-1]["layers"], loads[-1]["counts"]
        counts_LCE = torch.tensor([counts[domain] for domain in counts]).transpose(0, 1)
        load_heatmap(counts_LCE.sum(1), layers, plots / "load.png")
        if len(counts) > 1:
            shares = torch.stack([specialisation(counts_CE) for counts_CE in counts_LCE])
            specialisation_heatmap(shares, layers, list(counts), plots / "domains.png")


def _make_directory(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{run}: cannot be made ({error.strerror}); choose another out=DIR") from None


def _indent(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
