"""Is a run that is killed again and again the same run? Compares its last checkpoint byte for byte.

A tiny sparse model (dropout, noisy router, Muon) is trained once undisturbed and once killed with
SIGKILL --kills times and resumed each time: half of the kills inside a save, the rest at random moments
of start-up and training. With --on-disk the experts are (AdamW, no dropout): six of 24 fit in memory, so
every step writes some and reads them again, and after each kill the store must be sound as the newest
checkpoint refers to it. Ends with 1 when a byte differs, an expert does, or a life goes on from elsewhere
than the newest checkpoint.

    python benchmarks/kill_and_resume.py --kills 50
    python benchmarks/kill_and_resume.py --kills 200 --on-disk
"""

import argparse
import json
import mmap
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from moesaic.errors import MoesaicError
from moesaic.offload.model import FOLDER
from moesaic.offload.store import INDEX, Index, Store
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import newest_valid, read_tensors, step_name, step_of

TRAIN = [sys.executable, "-c", "from moesaic.cli import main; main()", "train"]
COMPARED = ("model.safetensors", "optimizer.safetensors")
# Experts of 4,096 bytes each, of which a step uses all and six fit.
ON_DISK = ["optim.kind=adamw", "model.dropout=0", "model.experts.count=12", "offload.memory=24KiB"]
EVERY = 3
LIFE_LIMIT = 300.0  # seconds after which a life that was to be killed inside a save counts as hung

RECIPE = """
name = "kill-and-resume"
data = {{ source = "files", path = {path}, tokenizer = "byte" }}
optim = {{ kind = "muon" }}
schedule = {{ kind = "cosine", warmup = 10 }}
[model]
layers = 2
width = 16
context = 32
dropout = 0.1
attention = {{ heads = 2 }}
experts = {{ count = 4, hidden = 16 }}
router = {{ kind = "noisy_top_k", top_k = 2 }}
[train]
steps = {steps}
batch_size = 4
seq_len = 32
log_every = 1
device = "cpu"
[eval]
every = 1000000
sample = 0
[checkpoint]
every = {every}
"""


@dataclass
class Tally:
    """What the kills did. ``where`` counts the moment each one hit."""

    where: Counter[str] = field(default_factory=Counter)
    resumed: list[int] = field(default_factory=list)  # the newest whole checkpoint after each kill
    opened: list[int] = field(default_factory=list)  # where a life said that it goes on
    astray: list[str] = field(default_factory=list)  # those that went on from elsewhere
    notes: list[str] = field(default_factory=list)
    uncommitted: int = 0  # kills after which experts had been written that no checkpoint refers to
    unsound: list[str] = field(default_factory=list)  # experts that a checkpoint refers to, damaged

    @property
    def kills(self) -> int:
        return self.where.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--on-disk", action="store_true", help="experts on disk, few of them in memory")
    parser.add_argument("--steps", type=int, help="steps of the run (default: enough for the kills)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the run's own seed stays")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave both runs in DIR, a new directory")
    args = parser.parse_args()
    if args.kills < 1:
        parser.error("--kills must be at least 1")
    if args.keep is not None:
        if args.keep.exists():
            parser.error(f"--keep {args.keep}: exists; name a new directory")
        args.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(str(args.keep)) as folder:
        steps = args.steps or 30 + 20 * args.kills
        draw, overrides = random.Random(args.seed), ON_DISK if args.on_disk else []
        return compare(Path(folder).resolve(), steps, args.kills, overrides, draw)


def compare(folder: Path, steps: int, kills: int, overrides: list[str], draw: random.Random) -> int:
    (folder / "text.txt").write_text(made_up_text(), encoding="utf-8")
    path = json.dumps(str(folder / "text.txt"))
    (folder / "recipe.toml").write_text(RECIPE.format(path=path, steps=steps, every=EVERY), encoding="utf-8")
    recipe = [str(folder / "recipe.toml"), *overrides]
    calm, killed = folder / "undisturbed", folder / "killed"

    print(f"training {steps} steps undisturbed", flush=True)
    started = time.monotonic()
    child = start(recipe, calm)
    await_first(child, lambda: bool(half_made(calm, child)))
    start_up = time.monotonic() - started
    finish(child, calm)
    pace = (time.monotonic() - started - start_up) / steps

    print(f"training them again with {kills} kills", flush=True)
    tally = Tally()
    while tally.kills < kills:
        inside = tally.where["inside a save"] + tally.where["while pruning"]
        if not one_life(recipe, killed, tally, draw, 2 * inside <= tally.kills, start_up, pace):
            print(f"FAILED: the run ended after {tally.kills} of {kills} kills; give more --steps")
            return 1
    before = last_step(killed, [])
    note_opening(finish(start(recipe, killed), killed), before, tally)
    return report(calm, killed, steps, tally)


def one_life(
    recipe: list[str],
    run: Path,
    tally: Tally,
    draw: random.Random,
    in_a_save: bool,
    start_up: float,
    pace: float,
) -> bool:
    """Start or resume, kill, and note what was hit; False when the run reached its end before."""
    before, began = last_step(run, []), time.time_ns()
    child = start(recipe, run)
    if in_a_save:
        later = before + EVERY * draw.randint(0, 3)
        await_first(child, lambda: any(step > later for step in half_made(run, child)))
        time.sleep(10 ** draw.uniform(-5, -2.3))  # 10 microseconds to 5 milliseconds
    else:
        moment = draw.uniform(0, start_up)
        if draw.random() < 0.7:  # else the kill comes before training does
            await_first(child, lambda: bool(half_made(run, child)))
            moment = draw.uniform(0, 20 * pace)
        with suppress(subprocess.TimeoutExpired):
            child.wait(moment)
    ended = child.poll()
    child.kill()
    _, errors = child.communicate()
    if ended is not None:
        if ended != 0:
            raise SystemExit(f"FAILED: resuming ended with exit code {ended}: {errors.decode()}")
        return False
    note_opening(errors.decode(), before, tally)
    after = last_step(run, tally.notes)
    tally.resumed.append(after)
    left = half_made(run, child)
    if any(step > after for step in left):
        tally.where["inside a save"] += 1
    elif left:
        tally.where["while pruning"] += 1
    elif after > before:
        tally.where["between saves"] += 1
    else:
        tally.where["before the first save of that life"] += 1
    look_at_store(run, began, tally)
    return True


def note_opening(said: str, newest: int, tally: Tally) -> None:
    """Note the step that a life goes on from, where it lived long enough to say it."""
    match = re.search(r": continues at step (\d+) of", said)
    if match is None:
        return
    tally.opened.append(int(match[1]))
    if int(match[1]) != newest:
        tally.astray.append(f"opened at step {match[1]}, the newest whole checkpoint was {newest}")


def look_at_store(run: Path, began: int, tally: Tally) -> None:
    """Note whether the life that ``began`` then and was killed had written experts after its newest
    checkpoint, and whether those that this one refers to are sound."""
    records, newest = run / FOLDER / "records.bin", newest_valid(run, lambda said: None)
    if not records.exists() or newest is None:
        return
    committed = max(began, (newest / "manifest.json").stat().st_mtime_ns)
    tally.uncommitted += records.stat().st_mtime_ns > committed
    store = opened(run, newest)
    tally.unsound += [f"after kill {tally.kills}: {reason}" for _, _, reason in store.damaged()]
    store.close()


def opened(run: Path, checkpoint: Path) -> Store:
    """A run's experts as a checkpoint refers to them."""
    store = Store.open(run / FOLDER)
    store.go_back(Index.of(read_tensors(checkpoint, INDEX)), [])
    return store


def start(recipe: list[str], run: Path) -> "subprocess.Popen[bytes]":
    words = [*recipe, f"out={run}", f"data.cache={run.parent / 'cache'}"]
    if (run / "recipe.toml").is_file():
        words.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TRAIN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def finish(child: "subprocess.Popen[bytes]", run: Path) -> str:
    """Wait for a life to reach the end; what it said."""
    _, errors = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"FAILED: {run} ended with exit code {child.returncode}: {errors.decode()}")
    return errors.decode()


def await_first(child: "subprocess.Popen[bytes]", seen: Callable[[], bool]) -> None:
    """Return at the first moment that ``seen`` is true, or when the child has ended."""
    limit = time.monotonic() + LIFE_LIMIT
    while not seen() and child.poll() is None:
        if time.monotonic() > limit:
            child.kill()
            raise SystemExit(f"FAILED: no save within {LIFE_LIMIT:.0f} s: {child.communicate()[1].decode()}")
        time.sleep(0.0002)


def half_made(run: Path, child: "subprocess.Popen[bytes]") -> list[int]:
    """The steps of the checkpoints that ``child`` has begun to write or to remove, and not ended."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return []
    found = [re.fullmatch(rf"\.step-(\d+)\.tmp-{child.pid}", name) for name in names]
    return [int(match[1]) for match in found if match]


def last_step(run: Path, notes: list[str]) -> int:
    """The step that a resume continues from; 0 before the first checkpoint."""
    try:
        newest = newest_valid(run, notes.append)
    except MoesaicError as error:
        raise SystemExit(f"FAILED: {error}") from None
    return 0 if newest is None else step_of(newest)


def report(calm: Path, killed: Path, steps: int, tally: Tally) -> int:
    print(f"kills: {tally.kills}")
    for where, count in tally.where.most_common():
        print(f"  {where}: {count}")
    print("newest whole checkpoint after each kill: step", " ".join(map(str, tally.resumed)))
    print(f"damaged checkpoints met: {len(tally.notes)}", *tally.notes, sep="\n  ")
    print(f"{len(tally.opened)} lives said where they went on: step", " ".join(map(str, tally.opened)))
    print(f"of these not from the newest whole checkpoint: {len(tally.astray)}", *tally.astray, sep="\n  ")
    differ = len(tally.astray)
    last = [run / "checkpoints" / step_name(steps) for run in (calm, killed)]
    if (killed / FOLDER).exists():
        print(f"kills after experts had been written since the last checkpoint: {tally.uncommitted}")
        print(f"damaged experts after a kill: {len(tally.unsound)}", *tally.unsound, sep="\n  ")
        differ += len(tally.unsound) + compare_experts(calm, killed, *last)
    for name in COMPARED:
        one, two = ((checkpoint / name).read_bytes() for checkpoint in last)
        same = one == two
        differ += not same
        print(f"{name}: {len(one):,} bytes, {'equal' if same else 'DIFFERENT'}")
    one_log, two_log = (
        [(row["step"], row["split"], row["loss"]) for row in read_rows(run / "metrics.jsonl")]
        for run in (calm, killed)
    )
    differ += one_log != two_log
    print(f"metrics.jsonl: {len(one_log):,} rows, losses {'equal' if one_log == two_log else 'DIFFERENT'}")
    print("verdict:", "DIFFERENT" if differ else "the killed run is the undisturbed run, bit for bit")
    return 1 if differ else 0


def compare_experts(calm: Path, killed: Path, calm_last: Path, killed_last: Path) -> int:
    """How many kinds of what the store holds differ: the weights and moments of all experts, as they are
    read, and what the index says of each but for its place."""
    one, two = opened(calm, calm_last), opened(killed, killed_last)
    layout, buffers = one.options.layout, [memoryview(mmap.mmap(-1, one.record)) for _ in range(2)]
    different = dict.fromkeys(("weights", "moments", "stamp", "steps", "checksum", "rates"), 0)
    for layer in range(one.options.layers):
        for expert in range(one.options.experts):
            one.read(layer, expert, buffers[0])
            two.read(layer, expert, buffers[1])
            a, b = (torch.frombuffer(buffer, dtype=torch.uint8)[None] for buffer in buffers)
            different["weights"] += not torch.equal(layout.weights_of(a), layout.weights_of(b))
            moments = zip(layout.read_moments(a), layout.read_moments(b), strict=True)
            different["moments"] += not all(torch.equal(mine, other) for mine, other in moments)
    tensors = [read_tensors(path, INDEX) for path in (calm_last, killed_last)]
    for name in ("stamp", "steps", "checksum"):
        different[name] = int((tensors[0][name] != tensors[1][name]).sum())
    different["rates"] = int(not torch.equal(tensors[0]["rates"], tensors[1]["rates"]))
    trained, moved = one.index.stamp > 0, one.index.place != two.index.place
    print(f"experts: {trained.size}, {int(trained.sum())} ever trained, {int(moved.sum())} at another place")
    for name, count in different.items():
        print(f"  {name}: {f'{count} DIFFERENT' if count else 'equal'}")
    return sum(count > 0 for count in different.values())


def made_up_text() -> str:
    draw = random.Random(0)
    words = [
        "the",
        "old",
        "river",
        "runs",
        "past",
        "a",
        "stone",
        "mill",
        "and",
        "turns",
        "its",
        "slow",
        "wheel",
    ]
    return "".join(" ".join(draw.choices(words, k=9)) + ".\n" for _ in range(400))


if __name__ == "__main__":
    sys.exit(main())
