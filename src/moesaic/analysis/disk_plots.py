"""Pictures of a run with experts on disk: what each stage of a curriculum did, and which experts were used.

Shape legend: L sparse layers, E experts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_DPI = 130


def stage_losses(stages: Sequence[dict[str, Any]], path: Path) -> None:
    """The first and the recent loss of each stage, in their order; rows are those of metrics.jsonl."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots()
    for place, stage in enumerate(stages):
        axes.plot([place, place], [stage["first"], stage["recent"]], color="#9db4c8", linewidth=2, zorder=1)
    places = range(len(stages))
    axes.scatter(
        places, [s["first"] for s in stages], color="#7a8a99", label="first loss of the stage", zorder=2
    )
    axes.scatter(
        places, [s["recent"] for s in stages], color="#c2452d", label="at its end (mean of late steps)"
    )
    axes.set_xticks(list(places), [s["domain"] for s in stages], rotation=40, ha="right")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25, axis="y")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=_DPI)


def usage_map(steps_LE: NDArray[np.int64], path: Path) -> None:
    """In how many steps each expert had a gradient: a strip for each layer, its experts in rows of 64."""
    L, E = steps_LE.shape
    columns = 64 if E > 64 else E
    rows = -(-E // columns)
    figure = Figure(figsize=(8.0, 0.6 + L * max(0.5, 0.11 * rows)), layout="constrained")
    grids = np.atleast_1d(np.asarray(figure.subplots(L, 1, sharex=True)))
    most = max(1, int(steps_LE.max()))
    colours = matplotlib.colormaps["viridis"].copy()
    colours.set_bad("#202020")
    for layer, axes in enumerate(grids):
        padded = np.full(rows * columns, np.nan)
        padded[:E] = steps_LE[layer]
        shown = np.ma.masked_less(np.ma.masked_invalid(padded.reshape(rows, columns)), 1)
        image = axes.imshow(shown, aspect="auto", cmap=colours, norm="log", vmin=1, vmax=max(2, most))
        axes.set_yticks([])
        axes.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
    grids[-1].set_xlabel(f"experts, {columns} to a row; dark: never used")
    bar = figure.colorbar(image, ax=list(grids), fraction=0.03)
    bar.set_label("steps with a gradient")
    figure.savefig(path, dpi=_DPI)
