"""``moesaic demo-arche``: 2,560 experts on disk learn the curriculum; what came of it, and what it took."""

import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.analysis.disk_plots import stage_losses, usage_map
from moesaic.files import human_size
from moesaic.machine import peak_memory
from moesaic.offload.store import INDEX, Index
from moesaic.train.loop import train
from moesaic.train.recipe import load_recipe
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import read_tensors

_STAGE = 12  # steps of a domain at most: fourteen of them in a few minutes


def run_arche_demo(out: Console, directory: Path, seed: int, program: str) -> Path:
    """Train ``arche-small``, one stage for every domain, and show losses, experts used and memory; the
    run."""
    started = time.perf_counter()
    words = [f"out={directory}", f"seed={seed}", f"curriculum.stage={_STAGE}", f"train.steps={14 * _STAGE}"]
    run = train(load_recipe("arche-small", words))
    rows = read_rows(run / "metrics.jsonl")
    stages = [row for row in rows if row["split"] == "stage"]
    held_out = [row for row in rows if row["split"] == "val"][-1]
    table = Table(title="domain by domain", title_justify="left", title_style="bold")
    for name in ("domain", "steps", "first loss", "recent loss", "held out at the end"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    for stage in stages:
        losses = (stage["first"], stage["recent"], held_out[f"loss/{stage['domain']}"])
        table.add_row(stage["domain"], str(stage["steps"]), *(f"{loss:.3f}" for loss in losses))
    out.print(table)
    index = Index.of(read_tensors(run / "model", INDEX))
    used, total = int((index.steps > 0).sum()), index.steps.size
    busiest = np.percentile(index.steps[index.steps > 0], [5, 50, 95])
    lines = [
        f"held-out loss of all: {held_out['loss']:.3f} nats per token",
        f"experts ever used: {used:,} of {total:,} ({100 * used / total:.1f} %), each in {busiest[0]:.0f}, "
        f"{busiest[1]:.0f}, {busiest[2]:.0f} steps (percentiles 5, 50, 95)",
        f"peak memory of the process: {human_size(peak_memory())}; experts on disk: "
        f"{human_size((run / 'experts' / 'records.bin').stat().st_blocks * 512)}",
    ]
    stage_losses(stages, run / "plots" / "stages.png")
    usage_map(index.steps, run / "plots" / "usage.png")
    lines += [
        f"{time.perf_counter() - started:.0f} s. Figures: {run / 'plots'}/stages.png, usage.png",
        f"{program} store info {run}",
        f"{program} generate {run} -p 'OBSERVE:'",
    ]
    for line in lines:
        out.print(Text(line), soft_wrap=True)
    return run
