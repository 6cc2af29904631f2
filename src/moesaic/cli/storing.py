"""``moesaic store``: what a run keeps on disk of its experts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.arguments import AsJson
from moesaic.errors import CheckpointError
from moesaic.terminal import print_rows, say

if TYPE_CHECKING:
    from moesaic.offload.store import Index, Store

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with experts on disk.")]


def _opened(run: Path, write: bool = False) -> tuple["Store", "dict[Path, Index]"]:
    """The store of a run as the newest that was saved of it refers to it, and all indexes, that one first.
    Raises CheckpointError where there is none."""
    from moesaic.offload.model import FOLDER
    from moesaic.offload.store import Store
    from moesaic.weights.checkpoint import newest_valid
    from moesaic.weights.indexes import indexes

    store = Store.open(run / FOLDER, write=write)
    found = indexes(run)
    newest = None
    try:
        newest = newest_valid(run, say)
    except CheckpointError:
        if run / "model" not in found:
            raise
    first = newest or run / "model"
    if first not in found:
        raise CheckpointError(f"{run}: has saved no checkpoint yet, so nothing says which expert is where")
    store.go_back(found[first], found.values())
    return store, {first: found.pop(first), **found}


def info(run: RunDir, as_json: AsJson = False) -> None:
    """What a store holds: experts trained, as of when, and what they take."""
    import numpy as np

    from moesaic.files import human_size
    from moesaic.offload.store import INDEX
    from moesaic.weights.checkpoint import read_tensors

    store, found = _opened(run)
    newest = next(iter(found))
    options, index, step = store.options, store.index, len(read_tensors(newest, INDEX)["rates"])
    total = options.layers * options.experts
    trained = int((index.stamp > 0).sum())
    ages = step - index.stamp[index.stamp > 0]
    steps = index.steps[index.steps > 0]
    parts = [5, 50, 95]
    rows = [
        (
            "experts",
            f"{total:,} in {options.layers} layers, {options.layout.shape.parameters:,} parameters each",
        ),
        ("as of", f"{newest.name}, after {step:,} updates"),
        ("ever trained", f"{trained:,} ({100 * trained / total:.1f} %)"),
        (
            "a record",
            f"{human_size(store.record)}: weights {options.layout.weights}, moments {options.layout.moments}",
        ),
        ("on disk", f"{human_size(store.disk_bytes())}, {store.free_places():,} of its places free"),
        ("direct I/O", "yes" if store.direct else "no: the page cache holds them too"),
    ]
    if trained:
        shown = ", ".join(f"{n:.0f}" for n in np.percentile(steps, parts))
        idle = ", ".join(f"{n:.0f}" for n in np.percentile(ages, parts))
        rows.append(("steps of an expert", f"{shown} (percentiles 5, 50, 95 of those ever trained)"))
        rows.append(("steps since its last", f"{idle} (the same)"))
    print_rows(rows, as_json, f"{run}: experts on disk")


def verify(run: RunDir) -> None:
    """Read every record that a checkpoint refers to and check it; names each expert that is damaged, and
    fails if there is one."""
    store, found = _opened(run)
    passed: set[tuple[int, int]] = set()
    damaged = 0
    for path, index in found.items():
        store.index = index
        bad = store.damaged(passed)
        damaged += len(bad)
        for _, _, reason in bad:
            say(f"{path.name}: {reason}")
    if damaged:
        raise CheckpointError(f"{run}: {damaged} records of experts are damaged")
    say(f"{len(passed):,} records are sound, all that {', '.join(path.name for path in found)} refer to")


def compact(run: RunDir) -> None:
    """Give the disk back what no checkpoint refers to."""
    from moesaic.files import human_size

    store, _ = _opened(run, write=True)
    say(f"{human_size(store.compact())} given back; {human_size(store.disk_bytes())} are left")
