"""What a store of experts on disk does when it is damaged, shared, read-only or out of room.

A small run (24 experts on disk) is trained on the spot. Every row is a case: the exit code that is promised,
the one that was found, and what was said. Flipped bits are put into random records in use, one at a time, and
must be met by whoever reads that expert (the library, in this process); the other cases are commands of the
command line. Read-only directories and full disks are mounts in a mount namespace of their own (unshare);
where that is not permitted the former are skipped and the latter done with a limit on the size of files
alone, and that is said. Ends with 1 where a row differs from its promise.

    python benchmarks/damaged_store.py --flips 1000
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from kill_and_resume import ON_DISK, RECIPE, made_up_text

import moesaic
from moesaic.errors import CheckpointError
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.experts import DiskExperts
from moesaic.offload.model import FOLDER
from moesaic.offload.store import INDEX, Store

ENTRY = [sys.executable, "-c", "from moesaic.cli import main; main()"]
STEPS, MORE = 12, 24
FULL = ("400k", "3m", "4500k")  # sizes of disks that are full before, between and after the first checkpoints
MANY = ["model.experts.count=200", "checkpoint.every=2"]  # a run that outgrows them
GENERATE = ["--prompt", "the old river runs past a stone mill", "-n", "20"]


@dataclass
class Table:
    """The rows so far, printed as they come. ``missed`` counts those that differ from their promise."""

    folder: Path
    missed: int = 0
    skipped: list[str] = field(default_factory=list)

    def header(self) -> None:
        print(f"{'case':64} {'wanted':>6} {'found':>6}  said", flush=True)

    def row(self, case: str, wanted: int | str, found: int | str, said: str, words: str = "") -> None:
        """A case; ``words``, where given, must be in what was said."""
        right = wanted == found and words in said
        self.missed += not right
        line = (said.strip().splitlines() or [""])[-1].replace(f"{self.folder}/", "")
        mark = "" if right else f"  <-- DIFFERS{f' (must say: {words})' if words not in said else ''}"
        print(f"{case:64} {wanted!s:>6} {found!s:>6}  {line}{mark}", flush=True)

    def skip(self, case: str, why: str) -> None:
        self.skipped.append(case)
        print(f"{case:64} {'':>6} {'':>6}  SKIPPED: {why}", flush=True)


@dataclass(frozen=True)
class Place:
    """Where commands run: in a mount namespace, or (no ``prefix``) where this process is."""

    prefix: tuple[str, ...] = ()

    def run(self, *words: str) -> tuple[int, str]:
        """The exit code of a command and what it said."""
        done = subprocess.run([*self.prefix, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stderr + ("" if done.returncode else done.stdout)

    def moesaic(self, *words: str) -> tuple[int, str]:
        """The same of the command line."""
        return self.run(*ENTRY, *words)


HERE = Place()


@contextmanager
def mounted(script: str, *words: str) -> Iterator[Place | None]:
    """A mount namespace in which a shell script has run; None where that is not permitted."""
    for kind, more in (([], []), (["--user", "--map-root-user"], ["--user", "--preserve-credentials"])):
        command = ["unshare", "--mount", *kind, "sh", "-ec", f"{script}; echo ready; cat", "sh", *words]
        holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        if holder.stdout.readline() == "ready\n":
            try:
                yield Place(("nsenter", "--target", str(holder.pid), "--mount", *more))
            finally:
                holder.stdin.close()
                holder.wait()
            return
        holder.stdin.close()
        holder.wait()
    yield None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--flips", type=int, default=1000, help="how many single bits (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of where the bits are")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the runs in DIR, a new directory")
    args = parser.parse_args()
    if args.keep is not None:
        if args.keep.exists():
            parser.error(f"--keep {args.keep}: exists; name a new directory")
        args.keep.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(str(args.keep)) as name:
        folder = Path(name).resolve()
        (folder / "text.txt").write_text(made_up_text(), encoding="utf-8")
        path = json.dumps(str(folder / "text.txt"))
        (folder / "recipe.toml").write_text(RECIPE.format(path=path, steps=STEPS, every=3), encoding="utf-8")
        table = Table(folder)
        table.header()
        code, said = HERE.moesaic("train", *words(folder), f"out={folder / 'run'}")
        table.row("a new run", 0, code, said)
        if code:
            return 1
        flipped_bits(folder / "run", args.flips, random.Random(args.seed), table)
        damaged_files(folder, table)
        two_writers(folder, table)
        read_only(folder, table)
        full_disks(folder, table)
    skipped = f", {len(table.skipped)} skipped" if table.skipped else ""
    print("verdict:", f"{table.missed} rows DIFFER" if table.missed else f"as promised{skipped}")
    return 1 if table.missed else 0


def words(folder: Path) -> list[str]:
    """What every training command begins with."""
    return [str(folder / "recipe.toml"), *ON_DISK, f"data.cache={folder / 'cache'}"]


def resume(folder: Path, run: Path, *more: str) -> list[str]:
    """The words that train a run on for a few steps."""
    return ["train", *words(folder), f"out={run}", "--resume", f"train.steps={MORE}", *more]


def flipped_bits(run: Path, flips: int, draw: random.Random, table: Table) -> None:
    """Flip one bit of a record in use, gather its expert as a forward pass does, twice, and flip it back."""
    lm = moesaic.load(run)  # whose experts are closed with it
    source = experts_of(lm)
    store, records = source.store, run / FOLDER / "records.bin"
    used = [
        (int(layer), int(expert)) for layer, expert in zip(*np.nonzero(store.index.place >= 0), strict=True)
    ]
    met, again, said = 0, 0, ""
    with records.open("r+b") as raw:
        for _ in range(flips):
            layer, expert = draw.choice(used)
            bit = draw.randrange(8 * store.record)
            offset = int(store.index.place[layer, expert]) * store.record + bit // 8
            raw.seek(offset)
            (good,) = raw.read(1)
            overwrite(raw.fileno(), offset, good ^ (1 << bit % 8))
            source.pool.forget()
            right, said = refuses(source, layer, expert, said)
            met += right
            right, said = refuses(source, layer, expert, said)
            again += right
            overwrite(raw.fileno(), offset, good)
    source.pool.forget()
    bad = source.store.damaged()
    table.row(f"{flips} flipped bits, each expert read", flips, met, said)
    table.row(f"{flips} flipped bits, each expert read again by the same process", flips, again, said)
    table.row("all flipped back: damaged experts", 0, len(bad), "")


def overwrite(file: int, offset: int, value: int) -> None:
    os.pwrite(file, bytes([value]), offset)
    os.fsync(file)  # so that direct reads see it too


def refuses(source: DiskExperts, layer: int, expert: int, said: str) -> tuple[bool, str]:
    """Whether reading an expert raises CheckpointError with its name; what it said, or else was said
    before."""
    try:
        source.gather(layer, [expert], torch.float32)
    except CheckpointError as error:
        return f"expert {expert} of layer {layer} " in str(error), str(error)
    return False, said


def experts_of(lm: moesaic.LM) -> DiskExperts:
    """Where a model has its experts from."""
    bank = lm.model.moe_modules()[0].experts
    assert isinstance(bank, OffloadedExperts)
    assert isinstance(bank.source, DiskExperts)
    return bank.source


def damaged_files(folder: Path, table: Table) -> None:
    """Cut, remove and overwrite files of a copy of the run."""
    run = copied(folder, "cut")
    records = run / FOLDER / "records.bin"
    lm = moesaic.load(run)
    index, record = experts_of(lm).store.index, experts_of(lm).store.record
    last = int(index.place.max())
    layer, expert = (int(n) for n in np.argwhere(index.place == last)[0])
    name = f"expert {expert} of layer {layer} "
    os.truncate(records, last * record + 100)
    table.row("a record cut short: store verify", 4, *HERE.moesaic("store", "verify", str(run)), name)
    os.truncate(records, record)
    table.row("records.bin truncated: store verify", 4, *HERE.moesaic("store", "verify", str(run)))
    table.row("records.bin truncated: generate", 4, *HERE.moesaic("generate", str(run), *GENERATE), "expert ")
    table.row("records.bin truncated: train --resume", 4, *HERE.moesaic(*resume(folder, run)), "expert ")

    run = copied(folder, "missing")
    (run / FOLDER / "records.bin").unlink()
    for verb in ("info", "verify"):
        table.row(f"records.bin missing: store {verb}", 4, *HERE.moesaic("store", verb, str(run)))
    table.row("records.bin missing: generate", 4, *HERE.moesaic("generate", str(run), *GENERATE))
    table.row("records.bin missing: train --resume", 4, *HERE.moesaic(*resume(folder, run)))
    after = HERE.moesaic("store", "info", str(run))  # which nothing may have put an empty file in place of
    table.row("records.bin missing, after --resume: store info", 4, *after)

    run = copied(folder, "json")
    (run / FOLDER / "store.json").write_text("{")
    table.row("store.json damaged: store info", 4, *HERE.moesaic("store", "info", str(run)), "store.json")

    run = copied(folder, "index")
    newest = run / "checkpoints" / (run / "latest").read_text().strip()
    shutil.rmtree(run / "model")
    with (newest / INDEX).open("r+b") as raw:
        overwrite(raw.fileno(), 500, 255)
    said = "falling back"
    table.row("the newest index damaged: store verify", 0, *HERE.moesaic("store", "verify", str(run)), said)
    table.row("the newest index damaged: generate", 0, *HERE.moesaic("generate", str(run), *GENERATE), said)
    table.row("the newest index damaged: train --resume", 0, *HERE.moesaic(*resume(folder, run)), said)


def copied(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder / "run", folder / name))


def two_writers(folder: Path, table: Table) -> None:
    """A second writer beside one that only holds the store, and beside a run in training; readers too."""
    run = copied(folder, "held")
    holder = Store.open(run / FOLDER, write=True)
    said = "another process writes these experts"
    table.row("a second writer: store compact", 2, *HERE.moesaic("store", "compact", str(run)), said)
    table.row("a second writer: train --resume", 2, *HERE.moesaic(*resume(folder, run)), said)
    table.row("a reader beside a writer: store verify", 0, *HERE.moesaic("store", "verify", str(run)))
    holder.close()
    table.row("a writer after the first has left", 0, *HERE.moesaic("store", "compact", str(run)))

    run = copied(folder, "busy")
    # Saved every few seconds: a reader has until its checkpoint makes room, after two more, to read what it
    # wants; beside a run that saves ten times a second it may be told to open the run anew (exit 4).
    endless = [*resume(folder, run), "train.steps=1000000", "checkpoint.every=100"]
    child = subprocess.Popen([*ENTRY, *endless], stderr=subprocess.PIPE, text=True)
    before, limit = (run / "latest").read_text(), time.monotonic() + 120
    while (run / "latest").read_text() == before and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    table.row("beside a run in training: train --resume", 2, *HERE.moesaic(*endless))
    table.row("beside a run in training: store compact", 2, *HERE.moesaic("store", "compact", str(run)), said)
    table.row("beside a run in training: store verify", 0, *HERE.moesaic("store", "verify", str(run)))
    table.row("beside a run in training: generate", 0, *HERE.moesaic("generate", str(run), *GENERATE))
    child.send_signal(signal.SIGTERM)
    _, errors = child.communicate(timeout=120)
    table.row("the run in training, stopped by SIGTERM", 75, child.returncode, errors)
    table.row("that run afterwards: store verify", 0, *HERE.moesaic("store", "verify", str(run)))


def read_only(folder: Path, table: Table) -> None:
    """Readers and writers on a run that is mounted read-only (the super-user heeds no permission bits)."""
    run = copied(folder, "frozen")
    with mounted('mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"', str(run)) as place:
        if place is None:
            table.skip("a read-only directory", "mounting is not permitted here")
            return
        for verb in ("info", "verify"):
            table.row(f"a read-only directory: store {verb}", 0, *place.moesaic("store", verb, str(run)))
        table.row("a read-only directory: generate", 0, *place.moesaic("generate", str(run), *GENERATE))
        table.row("a read-only directory: train --resume", 2, *place.moesaic(*resume(folder, run)))
        table.row("a read-only directory: store compact", 2, *place.moesaic("store", "compact", str(run)))


def full_disks(folder: Path, table: Table) -> None:
    """Runs that outgrow their disk; then its last checkpoint is opened, and with more room it goes on."""
    for size in FULL:
        disk = folder / f"disk-{size}"
        disk.mkdir()
        with mounted(f'mount -t tmpfs -o size={size} none "$1"', str(disk)) as place:
            if place is None:
                table.skip(f"a disk of {size}", "mounting is not permitted here")
                continue
            run, case = disk / "run", f"a disk of {size}"
            table.row(f"{case}, full: train", 6, *place.moesaic("train", *words(folder), *MANY, f"out={run}"))
            opens(place, run, case, table)
            place.run("mount", "-o", "remount,size=64m", str(disk))
            goes_on = ["train", *words(folder), *MANY, f"out={run}"]
            if place.run("test", "-f", str(run / "recipe.toml"))[0] == 0:
                goes_on.append("--resume")
            table.row(f"{case}, with more room: train", 0, *place.moesaic(*goes_on))
            table.row(f"{case}, then: store verify", 0, *place.moesaic("store", "verify", str(run)))
            used = place.run("df", "-k", "--output=used", str(disk))[1].split()[1]
            place.run("mount", "-o", f"remount,size={int(used) + 64}k", str(disk))
            more = resume(folder, run, *MANY)
            table.row(f"{case}, but for 64 KiB full again: train --resume", 6, *place.moesaic(*more))
            opens(place, run, f"{case}, full again", table)
    run = folder / "limited"
    limited = Place(("sh", "-c", 'ulimit -f 2048; exec "$@"', "sh"))  # in blocks of 512 bytes
    train = ["train", *words(folder), *MANY, f"out={run}"]
    table.row("files limited to 1 MiB: train", 6, *limited.moesaic(*train))
    opens(HERE, run, "files limited to 1 MiB", table)
    goes_on = [*train, "--resume"] if (run / "recipe.toml").exists() else train
    table.row("files limited no more: train", 0, *HERE.moesaic(*goes_on))


def opens(place: Place, run: Path, case: str, table: Table) -> None:
    """The last checkpoint must be whole; where none was saved yet, that must be what is said."""
    saved = place.run("sh", "-c", 'ls -d "$1"/checkpoints/step-*', "sh", str(run))[0] == 0
    code, said = place.moesaic("store", "verify", str(run))
    if saved:
        table.row(f"{case}: store verify of its last checkpoint", 0, code, said)
    elif place.run("test", "-e", str(run / FOLDER / "store.json"))[0] == 0:
        table.row(f"{case}: store verify, no checkpoint yet", 4, code, said, "no checkpoint yet")
    else:
        table.row(f"{case}: store verify, no store yet", 2, code, said)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # a damaged checkpoint that is passed over
    sys.exit(main())
