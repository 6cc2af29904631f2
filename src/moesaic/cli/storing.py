"""``moesaic store``: what a run keeps on disk of its experts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.arguments import AsJson
from moesaic.errors import CheckpointError
from moesaic.terminal import print_rows, say

if TYPE_CHECKING:
    from moesaic.offload.store import Store

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory with experts on disk.")]


def _opened(run: Path, write: bool = False) -> tuple["Store", int]:
    """The store of a run as its newest checkpoint refers to it, and that checkpoint's step. Raises
    CheckpointError where there is none."""
    from moesaic.offload.model import FOLDER
    from moesaic.offload.store import INDEX, Index, Store
    from moesaic.weights.checkpoint import newest_valid, read_tensors, step_of

    store = Store.open(run / FOLDER, write=write)
    newest = newest_valid(run, say)
    if newest is None:
        raise CheckpointError(f"{run}: has saved no checkpoint yet, so nothing says which expert is where")
    kept = []
    for path in [*newest.parent.glob("step-*"), run / "model"]:
        if (path / INDEX).exists():
            kept.append(Index.of(read_tensors(path, INDEX)))
    store.go_back(Index.of(read_tensors(newest, INDEX)), kept)
    return store, step_of(newest)


def info(run: RunDir, as_json: AsJson = False) -> None:
    """What a store holds: experts trained, as of when, and what they take."""
    import numpy as np

    from moesaic.files import human_size

    store, step = _opened(run)
    options, index = store.options, store.index
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
        ("as of step", f"{step:,}"),
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
    """Read every record and check it; names each expert that is damaged, and fails if there is one."""
    store, step = _opened(run)
    bad = store.damaged()
    for _, _, reason in bad:
        say(reason)
    if bad:
        raise CheckpointError(f"{run}: {len(bad)} of its experts are damaged")
    say(f"{int((store.index.place >= 0).sum()):,} records of step {step:,} are sound")


def compact(run: RunDir) -> None:
    """Give the disk back what no checkpoint refers to."""
    from moesaic.files import human_size

    store, _ = _opened(run, write=True)
    say(f"{human_size(store.compact())} given back; {human_size(store.disk_bytes())} are left")
