"""What a step of arche-7b takes: seconds, memory and disk traffic, beside what disk and processor can do.

Measures the machine's bf16 matmul rate and the disk's rate for records of the store's size (direct I/O, eight
threads, a scratch file in the output folder), then trains the recipe as the command line does, in a process
that it watches, under a hard limit on memory if there is one (limited.py), and perhaps decodes with what was
trained. Trailing words override the recipe. Without --out all is removed at the end. No time is a failure;
ends with 1 where training or decoding fails.

    python benchmarks/arche_7b.py --budget 24 --limit 5GB --generate 64
    python benchmarks/arche_7b.py --run runs/arche-7b --generate 64
"""

import argparse
import errno
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from limited import Limit, Seen, watch

from moesaic.errors import RecipeError
from moesaic.files import human_size
from moesaic.machine import describe, matmul_rate
from moesaic.offload.model import FOLDER, bytes_of
from moesaic.offload.records import ExpertShape, Layout
from moesaic.offload.store import INDEX, Index
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import newest_valid, read_tensors

TRAIN = [sys.executable, "-c", "from moesaic.cli import main; main()", "train", "arche-7b"]
SKIPPED = 20  # steps at the beginning, of which no time is reported
EDGE = 20  # steps at each end whose loss is reported
THREADS = 8
PAUSE = 0.1  # seconds between looks at a run in training

DECODE = """
import json, re, sys, time
import moesaic
from moesaic.generate import SampleOptions, stream
started = time.perf_counter()
lm = moesaic.load(sys.argv[1])
lm.lay_out(None)
said = {"load": time.perf_counter() - started, "runs": []}
for _ in range(2):
    started, times = time.perf_counter(), []
    for _ in stream(lm.model, lm.ids(sys.argv[3]), int(sys.argv[2]), SampleOptions(temperature=0)):
        times.append(time.perf_counter() - started)
    said["runs"].append(times)
status = open("/proc/self/status").read()
said["resident"] = 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status)[1])
print(json.dumps(said))
"""


@dataclass
class Trained:
    """What was seen of a run: of each step, what its process had read and written by then."""

    started: float
    store: float | None = None  # seconds until store.json was there
    ready: float | None = None  # until all was built and training began
    at_once: int = 0  # bytes of the store on disk then
    wall: float = 0.0
    traffic: dict[int, tuple[int, int]] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="24", help="model.router.budget: a number or none (default 24)")
    parser.add_argument("--steps", type=int, default=520)
    parser.add_argument("--limit", metavar="SIZE", help="hard limit on memory, page cache included: 5GB")
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave the run in DIR, a new directory")
    parser.add_argument(
        "--run", type=Path, metavar="DIR", help="decode with this run instead of training one"
    )
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="decode N tokens, twice")
    parser.add_argument("--prompt", default="def main():", help="what they follow")
    parser.add_argument("--scratch", default="1GiB", metavar="SIZE", help="of the file that rates the disk")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="of the recipe")
    args = parser.parse_intermixed_args()
    try:
        size = None if args.limit is None else bytes_of(args.limit)
        scratch = bytes_of(args.scratch)
    except ValueError as error:
        parser.error(str(error))
    if args.run is not None:
        return 0 if decode(args.run, args.generate or 64, args.prompt, size) else 1
    if args.out is not None and args.out.exists():
        parser.error(f"--out {args.out}: exists; name a new directory")
    words = [f"model.router.budget={args.budget}", f"train.steps={args.steps}", *args.words]
    words.append("train.log_every=1")
    try:
        recipe = load_recipe("arche-7b", words)
    except RecipeError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() if args.out is None else nullcontext(str(args.out)) as folder:
        out = Path(folder).resolve() / "run" if args.out is None else args.out.resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        print(f"arche-7b {' '.join(words)}", flush=True)
        rate = rates(recipe, out.parent, scratch)
        if not training(recipe, [*words, f"out={out}"], out, size, rate):
            return 1
        if args.generate and not decode(out, args.generate, args.prompt, size):
            return 1
    return 0


def row(name: str, value: str) -> None:
    print(f"  {name:34} {value}", flush=True)


def rates(recipe: Recipe, folder: Path, scratch: int) -> tuple[float, float]:
    """Print what the processor and the disk can do; bytes per second that the disk reads and writes."""
    facts = describe()
    print(f"the machine: {facts['processor']}, {facts['cores']} cores, torch {facts['packages']['torch']}")
    row("bf16 matmul, 2048³", f"{matmul_rate(torch.bfloat16) / 1e9:,.0f} GFLOP/s")
    shape = ExpertShape(recipe.model.experts.kind, recipe.model.width, recipe.model.experts.hidden)
    record = Layout(shape, recipe.offload.weights, recipe.offload.moments).bytes
    read, write, direct = disk_rates(folder, record, max(1, scratch // record))
    how = "direct I/O" if direct else "NO direct I/O here: through the page cache"
    about = f"records of {human_size(record)}, {THREADS} threads, {how}"
    row("disk", f"reads {read / 1e9:.2f} GB/s, writes {write / 1e9:.2f} GB/s ({about})")
    return read, write


def disk_rates(folder: Path, record: int, count: int) -> tuple[float, float, bool]:
    """Bytes per second that records of a scratch file are read and written at, in random order; and whether
    past the page cache. The file is filled before, so that no write meets a hole, as in the store."""
    path = folder / f".scratch-{os.getpid()}"
    flags, direct = os.O_RDWR | os.O_CREAT, True
    try:
        file = os.open(path, flags | os.O_DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        file, direct = os.open(path, flags, 0o644), False
    try:
        os.posix_fallocate(file, 0, record * count)
        rates = []
        for move in (os.pwritev, os.pwritev, os.preadv):  # the first is to fill it
            order = list(range(count))
            random.Random(0).shuffle(order)
            started = time.perf_counter()
            with ThreadPoolExecutor(THREADS) as threads:
                jobs = [threads.submit(_move, move, file, record, order[n::THREADS]) for n in range(THREADS)]
                for job in jobs:
                    job.result()
            os.fsync(file)
            rates.append(record * count / (time.perf_counter() - started))
        return rates[2], rates[1], direct
    finally:
        os.close(file)
        path.unlink()


def _move(move: Any, file: int, record: int, places: list[int]) -> None:
    room = mmap.mmap(-1, record)
    for place in places:
        if move(file, [room], place * record) != record:
            raise OSError(errno.EIO, "a record of the scratch file was cut")


def training(
    recipe: Recipe, words: list[str], out: Path, size: int | None, rate: tuple[float, float]
) -> bool:
    """Train and print what it took; whether it came to its end."""
    with Limit(size) as limit, tempfile.TemporaryFile("w+") as said:
        child = limit.start([*TRAIN, *words], stdout=subprocess.DEVNULL, stderr=said)
        trained = look_on(child, out, limit)
        verdict = limit.verdict()
        print(f"training, process {'ended well' if child.returncode == 0 else 'FAILED'}:")
        if child.returncode != 0:
            said.seek(0)
            print(f"  exit code {child.returncode}: {said.read()[-2000:]}", flush=True)
    report(recipe, out, trained, rate)
    row("memory: VmHWM, sampled", human_size(trained.seen.resident))
    row("memory: limit", verdict)
    return child.returncode == 0


def look_on(child: "subprocess.Popen[str]", out: Path, limit: Limit) -> Trained:
    """Watch a run until its end."""
    trained, metrics, done = Trained(time.monotonic()), out / "metrics.jsonl", 0
    while child.poll() is None:
        now = time.monotonic() - trained.started
        if trained.store is None and (out / FOLDER / "store.json").exists():
            trained.store = now
        if trained.ready is None and (out / "recipe.toml").exists():
            trained.ready = now
            trained.at_once = (out / FOLDER / "records.bin").stat().st_blocks * 512
        trained.seen.look(child.pid)
        size = metrics.stat().st_size if metrics.exists() else 0
        if size != done:
            done = size
            steps = [entry["step"] for entry in read_rows(metrics) if entry["split"] == "train"]
            trained.traffic[max(steps, default=0)] = trained.seen.read, trained.seen.written
        limit.look(child.pid)
        time.sleep(PAUSE)
    limit.look(child.pid)
    trained.wall = time.monotonic() - trained.started
    return trained


def report(recipe: Recipe, out: Path, trained: Trained, rate: tuple[float, float]) -> None:
    """Print what a run took, of its metrics and of what was seen of it."""
    rows = read_rows(out / "metrics.jsonl")
    steps = [entry for entry in rows if entry["split"] == "train"]
    if trained.store is None or trained.ready is None or len(steps) < 2:
        print("  too few steps to report")
        return
    built = trained.ready - trained.store
    row("start-up and text", f"{trained.store:.1f} s until the store was made")
    row(
        "store and model made",
        f"{built:.1f} s; the store then takes {human_size(trained.at_once)} on disk",
    )
    # ``time`` counts evaluations too, which are rows of their own.
    seconds = [
        entry["time"] - before["time"]
        for before, entry in zip([{"time": 0.0}, *rows], rows, strict=False)
        if entry["split"] == "train" and "time" in before
    ]
    skipped = min(SKIPPED, len(seconds) // 2)
    kept = sorted(seconds[skipped:])
    low, high = (kept[round(share * (len(kept) - 1))] for share in (0.1, 0.9))
    median = statistics.median(kept)
    row(
        "seconds a step",
        f"median {median:.3f}, 10th percentile {low:.3f}, 90th {high:.3f} ({len(kept)} steps)",
    )
    row("seconds in all", f"{trained.wall:.0f}, {sum(seconds):.0f} of them in {len(steps)} steps")
    losses = [entry["loss"] for entry in steps]
    edge = min(EDGE, len(losses))
    first, last = statistics.mean(losses[:edge]), statistics.mean(losses[-edge:])
    row(f"loss of the first and last {edge} steps", f"{first:.3f}, {last:.3f}")
    newest = newest_valid(out, print)
    if newest is not None:
        used = Index.of(read_tensors(newest, INDEX)).steps > 0
        row("experts ever used", f"{int(used.sum()):,} of {used.size:,}")
        row("store on disk at the end", human_size((out / FOLDER / "records.bin").stat().st_blocks * 512))
    report_traffic(recipe, trained, skipped, len(steps), median, rate)


def report_traffic(
    recipe: Recipe, trained: Trained, skipped: int, steps: int, median: float, rate: tuple[float, float]
) -> None:
    """Print the disk traffic of steps between which nothing was saved or evaluated."""
    most = min(steps, recipe.eval.every, recipe.checkpoint.every) - 1
    known = [step for step in trained.traffic if max(1, skipped) <= step <= most]
    if len(known) < 2 or known[-1] == known[0]:
        row("disk traffic", "too few steps were seen")
        return
    (read, written), (read_on, written_on) = trained.traffic[known[0]], trained.traffic[known[-1]]
    count = known[-1] - known[0]
    reads, writes = (read_on - read) / count, (written_on - written) / count
    row("read and written a step", f"{human_size(reads)}, {human_size(writes)} (of /proc/PID/io, sampled,")
    row("", f"steps {known[0] + 1} to {known[-1]}, before anything was saved or evaluated)")
    share = (reads / rate[0] + writes / rate[1]) / median
    moved = (reads + writes) / median / 1e9
    row("moved", f"{moved:.3f} GB/s: {share:.0%} of the step's time at the disk's own rates")


def decode(run: Path, tokens: int, prompt: str, size: int | None) -> bool:
    """Decode greedily in a process of its own, twice the same, and print the pace; whether it did."""
    with Limit(size) as limit, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        words = [sys.executable, "-c", DECODE, str(run), str(tokens), prompt]
        child = limit.start(words, stdout=out, stderr=err)
        watch(child, limit)
        for file in (out, err):
            file.seek(0)
        print(f"decoding {tokens} tokens after {prompt!r}:")
        if child.returncode != 0:
            print(f"  FAILED, exit code {child.returncode}: {err.read()[-2000:]}")
        else:
            said = json.loads(out.read())
            row("loaded", f"{said['load']:.1f} s")
            for name, times in zip(("cold", "the same again, warm"), said["runs"], strict=True):
                rest = f", {(len(times) - 1) / (times[-1] - times[0]):.1f} after that" * (len(times) > 1)
                row(name, f"{len(times) / times[-1]:.1f} tokens/s; first token {times[0]:.2f} s{rest}")
            row("memory: VmHWM", human_size(said["resident"]))
        row("memory: limit", limit.verdict())
        return child.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
