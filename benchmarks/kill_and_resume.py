"""Is a run that is killed again and again the same run? Compares its last checkpoint byte for byte.

A tiny sparse model (dropout, noisy router, Muon) is trained once undisturbed and once killed with
SIGKILL --kills times and resumed each time: half of the kills inside a save, the rest at random moments
of start-up and training. Ends with 1 when a byte differs.

    python benchmarks/kill_and_resume.py --kills 50
"""

import argparse
import json
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

from moesaic.errors import MoesaicError
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import newest_valid, step_of

TRAIN = [sys.executable, "-c", "from moesaic.cli import main; main()", "train"]
COMPARED = ("model.safetensors", "optimizer.safetensors")
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
    resumed: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.where.total()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
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
        return compare(Path(folder).resolve(), steps, args.kills, random.Random(args.seed))


def compare(folder: Path, steps: int, kills: int, draw: random.Random) -> int:
    (folder / "text.txt").write_text(made_up_text(), encoding="utf-8")
    path = json.dumps(str(folder / "text.txt"))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(path=path, steps=steps, every=EVERY), encoding="utf-8")
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
    finish(start(recipe, killed), killed)
    return report(calm, killed, steps, tally)


def one_life(
    recipe: Path, run: Path, tally: Tally, draw: random.Random, in_a_save: bool, start_up: float, pace: float
) -> bool:
    """Start or resume, kill, and note what was hit; False when the run reached its end before."""
    before = last_step(run, [])
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
    return True


def start(recipe: Path, run: Path) -> "subprocess.Popen[bytes]":
    words = [str(recipe), f"out={run}", f"data.cache={run.parent / 'cache'}"]
    if (run / "recipe.toml").is_file():
        words.append("--resume")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TRAIN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def finish(child: "subprocess.Popen[bytes]", run: Path) -> None:
    _, errors = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"FAILED: {run} ended with exit code {child.returncode}: {errors.decode()}")


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
    differ = 0
    for name in COMPARED:
        one, two = ((run / "checkpoints" / f"step-{steps:08d}" / name).read_bytes() for run in (calm, killed))
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
