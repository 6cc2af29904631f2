"""What a recipe costs on this machine: parameters, memory, disk and time, from measured steps."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.analysis.evaluate import evaluate
from moesaic.errors import DivergedError, RecipeError
from moesaic.files import human_size
from moesaic.generate import SampleOptions, stream
from moesaic.machine import matmul_rate, peak_memory, read_bandwidth, total_memory
from moesaic.offload.experts import DiskExperts
from moesaic.train.loop import train_step
from moesaic.train.optim import optimizer_tensors, schedule_factor, set_learning_rate
from moesaic.train.recipe import Recipe
from moesaic.train.rundir import check_room, check_same_run, choose_directory, stored_recipe
from moesaic.train.session import Session, build_session


@dataclass(frozen=True)
class Cost:
    """Measured on real steps of the recipe. Seconds, bytes, floating-point operations."""

    parameters: int
    active: int
    step_seconds: float
    tokens_per_step: int
    flops_per_step: int
    eval_seconds: float
    total_seconds: float
    state_bytes: int
    checkpoint_bytes: int
    peak_bytes: int
    disk_bytes: int


def measure(session: Session, repeats: int = 5) -> Cost:
    """Take ``repeats`` real training steps (after two to warm up) and one evaluation batch.

    The session's weights are changed by it. Raises DivergedError when a step is not finite.
    """
    recipe, options = session.recipe, session.recipe.train
    seconds = []
    session.model.train()
    for step in range(1, repeats + 3):
        set_learning_rate(session.optimizers, schedule_factor(recipe.schedule, step, options.steps))
        start = time.perf_counter()
        _, norm = train_step(session, step)
        seconds.append(time.perf_counter() - start)
        if norm is None:
            raise DivergedError(f"step {step} of the measurement: the loss is not finite; lower optim.lr")
    step_seconds = statistics.median(seconds[2:])
    eval_seconds = _eval_seconds(session)
    weights = sum(p.numel() * p.element_size() for p in session.model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in session.trainable)
    state = sum(
        t.numel() * t.element_size() for t in optimizer_tensors(session.model, session.optimizers).values()
    )
    checkpoint, on_disk, slots = weights + state, 0, 0
    if session.experts is not None:
        slots, on_disk = session.experts.pool.memory, _experts_on_disk(session.experts, recipe, repeats + 2)
    counts = session.model.config.parameters()
    tokens = options.batch_size * options.seq_len
    evaluations = -(-options.steps // recipe.eval.every)
    return Cost(
        parameters=counts.total,
        active=counts.active,
        step_seconds=step_seconds,
        tokens_per_step=tokens,
        flops_per_step=3 * tokens * session.model.config.flops_per_token(options.seq_len),
        eval_seconds=eval_seconds,
        total_seconds=options.steps * step_seconds + evaluations * eval_seconds,
        state_bytes=weights + gradients + state + slots,
        checkpoint_bytes=checkpoint,
        peak_bytes=torch.cuda.max_memory_allocated() if session.device == "cuda" else peak_memory(),
        # While a checkpoint is written the ``keep`` before it still stand.
        disk_bytes=(recipe.checkpoint.keep + 1) * checkpoint + weights + on_disk,
    )


def _experts_on_disk(experts: DiskExperts, recipe: Recipe, steps: int) -> int:
    """Bytes that experts may come to take: every one once, and what each checkpoint and the finished model
    hold of others than the present, by how many experts a step has changed so far."""
    store = experts.store
    total = store.layers * store.experts
    between = min(recipe.checkpoint.every, recipe.train.steps)
    if recipe.curriculum.order in ("fixed", "shuffled"):  # a stage's end is saved
        between = min(between, recipe.curriculum.stage)
    changed = int(store.index.steps.sum()) / steps * between
    return int(store.record * (total + (recipe.checkpoint.keep + 1) * min(total, changed)))


@dataclass(frozen=True)
class Report:
    """What to print: rows of (what, how much) for people, numbers for programs."""

    rows: list[tuple[str, str]]
    numbers: dict[str, Any]


def dry_run(recipe: Recipe, say: Callable[[str], None], *, resume: bool = False) -> Report:
    """Check everything a run needs, take real steps, and report what the run would take.

    Nothing is written to the run directory; the token cache is filled. Raises what the run would: for
    the recipe, its data, its directory (or, to ``resume``, another recipe there) and the room on disk.
    """
    where = choose_directory(recipe, resume)
    if resume:
        check_same_run(stored_recipe(where), recipe, where)
    with _built(recipe, say) as session:
        return _measured(session, where)


@contextmanager
def _built(recipe: Recipe, say: Callable[[str], None]) -> Iterator[Session]:
    """A session to measure; experts on disk are in a folder that is removed afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="moesaic-") as folder,
        closing(build_session(recipe, say, run=Path(folder))) as session,
    ):
        yield session


def _measured(session: Session, where: Path) -> Report:
    recipe = session.recipe  # whose epochs have become steps
    cost = measure(session)
    check_room(where, cost.disk_bytes)
    config, store = session.model.config, session.store
    experts = config.experts.count * len(config.moe_layers)
    state, peak = human_size(cost.state_bytes), human_size(cost.peak_bytes)
    disk, checkpoint = human_size(cost.disk_bytes), human_size(cost.checkpoint_bytes)
    steps = f"{recipe.train.steps:,} steps on {session.device}"
    rows = [
        ("run directory", str(where)),
        ("parameters", f"{cost.parameters:,} in all, {cost.active:,} active per token, {experts:,} experts"),
        ("training tokens", f"{store.train_tokens:,} in {', '.join(store.domains)}"),
        ("memory", f"{state} weights, gradients and optimizer; {peak} at the peak of a step"),
        ("disk", f"{disk}, of it {checkpoint} per checkpoint"),
        ("one step", f"{_pace(cost)}, {cost.flops_per_step / cost.step_seconds / 1e9:,.0f} GFLOP/s"),
        ("one evaluation", f"{cost.eval_seconds:.1f} s"),
        ("whole run", f"{_duration(cost.total_seconds)} for {steps}"),
    ]
    numbers = {"run": str(where), "experts": experts, "train_tokens": store.train_tokens, **asdict(cost)}
    return Report(rows, numbers)


@dataclass(frozen=True)
class Cluster:
    """Machines to plan for: how many GPUs, what each multiplies at best (TFLOP/s) and holds (GB), and the
    share of that rate which training reaches. OLMoE's run reached 0.17 on 256 H100 (5.133 T tokens in about
    10 days)."""

    gpus: int
    tflops: float = 989.0
    memory_gb: float = 80.0
    mfu: float = 0.2


def too_large(recipe: Recipe) -> bool:
    """Whether this machine's memory cannot hold what training such a model takes, whatever its data."""
    memory = total_memory()
    if recipe.offload.memory is not None:
        return False
    if memory is None or recipe.model.vocab_size is None:  # its size is known when its data is
        return False
    return recipe.bytes_per_parameter() * recipe.model.parameters().total > memory


def plan(recipe: Recipe, cluster: Cluster | None) -> Report:
    """What a run needs by arithmetic alone: no data is read and no model built. Without a cluster, on this
    machine, whose matmul rate is measured. Raises RecipeError where model.vocab_size is not said."""
    config, options = recipe.model, recipe.train
    if config.vocab_size is None:
        raise RecipeError(
            "model.vocab_size: say it, to plan without data; it comes from the tokenizer otherwise"
        )
    if options.epochs is not None and "steps" not in options.model_fields_set:
        raise RecipeError("train.steps: say it, to plan without data; this recipe counts in epochs")
    counts = config.parameters()
    tokens = options.batch_size * options.seq_len * (2 if recipe.data.source == "preferences" else 1)
    flops = 3 * tokens * config.flops_per_token(options.seq_len) * options.steps
    state = recipe.bytes_per_parameter() * counts.total
    if cluster is None:
        memory, share, where = total_memory() or 0, 0.5, "this machine, at half of its bf16 matmul rate"
        rate = matmul_rate(torch.bfloat16)
    else:
        memory, share = int(cluster.gpus * cluster.memory_gb * 1e9), cluster.mfu
        where = f"{cluster.gpus} GPUs of {cluster.tflops:g} TFLOP/s, {cluster.mfu:g} of that reached"
        rate = cluster.gpus * cluster.tflops * 1e12
    seconds = flops / (rate * share)
    checkpoint = max(4, recipe.bytes_per_parameter() - 4) * counts.total  # all but gradients
    fits = "fits" if state < memory else "does NOT fit"
    rows = [
        ("parameters", f"{counts.total:,} in all, {counts.active:,} active per token"),
        ("tokens", f"{tokens * options.steps:,} in {options.steps:,} steps of {tokens:,}"),
        ("floating point", f"{flops:.3g} operations"),
        (
            "memory",
            f"{human_size(state)} in float32, without activations: weights, and gradients and moments of "
            f"what trains; {fits} in {human_size(memory)}",
        ),
        ("checkpoint", f"{human_size(checkpoint)}, {recipe.checkpoint.keep} of them kept"),
        ("time", f"{_duration(seconds)} on {where}"),
    ]
    numbers = {"parameters": counts.total, "active": counts.active, "tokens": tokens * options.steps}
    return Report(rows, {**numbers, "flops": flops, "state_bytes": state, "seconds": seconds})


def bench(recipe: Recipe, say: Callable[[str], None]) -> Report:
    """Training and decoding speed of a recipe beside the machine's own limits, from one run."""
    with _built(recipe, say) as session:
        return _benched(session)


def _benched(session: Session) -> Report:
    cost = measure(session, repeats=20)
    rate = matmul_rate(torch.bfloat16 if session.bf16 else torch.float32, device=session.device)
    achieved = cost.flops_per_step / cost.step_seconds
    decode = _decode_rate(session)
    weights = session.model.config.parameters().active * 4
    bandwidth = read_bandwidth(device=session.device)
    name = "bf16" if session.bf16 else "fp32"
    rows = [
        ("machine", f"{rate / 1e9:,.0f} GFLOP/s ({name} 2048³), reads {bandwidth / 1e9:.1f} GB/s"),
        ("training step", _pace(cost)),
        ("", f"{achieved / 1e9:,.0f} GFLOP/s, {achieved / rate:.2f} of the machine's matmul rate"),
        ("decoding", f"{decode:,.0f} tokens/s with the cache, one stream"),
        ("", f"{decode * weights / bandwidth:.2f} of the machine's bandwidth over the active weights"),
    ]
    numbers = {"precision": name, "matmul_flops": rate, "read_bytes_per_second": bandwidth}
    numbers |= {"decode_tokens_per_second": decode, **asdict(cost)}
    return Report(rows, numbers)


def _decode_rate(session: Session, repeats: int = 5) -> float:
    """Median greedy tokens per second inside the window, prefill of one token included."""
    new = min(session.model.config.context - 1, 128)
    prompt = torch.zeros(1, 1, dtype=torch.int64, device=session.device)
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        count = sum(1 for _ in stream(session.model, prompt, new, SampleOptions(temperature=0)))
        rates.append(count / (time.perf_counter() - start))
    return statistics.median(rates)


def _eval_seconds(session: Session) -> float:
    """Seconds of one whole evaluation, measured once."""
    start = time.perf_counter()
    evaluate(
        session.model,
        session.store,
        session.eval_batch_size(),
        session.recipe.train.seq_len,
        session.precision,
        session.recipe.eval.windows,
    )
    return time.perf_counter() - start


def _pace(cost: Cost) -> str:
    return f"{1000 * cost.step_seconds:.1f} ms, {cost.tokens_per_step / cost.step_seconds:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"
