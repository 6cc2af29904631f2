"""The figures of a routing analysis, as PNG, each with what a routing without structure would show.

Shape legend: L sparse layers, E experts, C domains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moesaic.analysis.census import Census

_DPI = 130
_GREY = "#8a8a8a"


def draw_all(numbers: dict[str, Any], census: Census, folder: Path) -> list[Path]:
    """Every figure that the numbers have something for; the files."""
    drawn = []
    for name, wanted, draw in (
        ("domains.png", True, _domains),
        ("coactivation.png", numbers["top_k"] > 1, _coactivation),
        ("vocabulary.png", True, _vocabulary),
        ("load.png", True, _load),
        ("saturation.png", bool(numbers["saturation"]), _saturation),
    ):
        if wanted:
            draw(numbers, census).savefig(folder / name, dpi=_DPI)
            drawn.append(folder / name)
    return drawn


def _domains(numbers: dict[str, Any], census: Census) -> Figure:
    """The share of each domain's tokens that chose each expert, and the uniform line (Figure 21 there)."""
    shown, domains = census.shown, census.domains
    E, C = census.experts, len(domains)
    figure = Figure(
        figsize=(max(6.0, min(18.0, 1.2 + 0.12 * E * C)), 0.6 + 1.9 * len(shown)), layout="constrained"
    )
    grid = figure.subplots(len(shown), 1, squeeze=False, sharex=True)
    colours = _colours(C)
    width = 0.8 / C
    for axes, n in zip(grid[:, 0], shown, strict=True):
        share_CE = 100 * np.array(numbers["domain_shares"][n])
        for c, name in enumerate(domains):
            axes.bar(
                np.arange(E) + (c - (C - 1) / 2) * width, share_CE[c], width, color=colours[c], label=name
            )
        axes.axhline(
            100 * numbers["experts_per_token"] / E, color=_GREY, linestyle="--", linewidth=1, label="uniform"
        )
        axes.set_title(f"layer {census.layers[n]}", fontsize=9)
        axes.set_ylabel("% of tokens")
        axes.margins(x=0.01)
    _experts(grid[-1, 0], census)
    grid[0, 0].legend(
        frameon=False, fontsize=8, ncols=min(6, C + 1), loc="upper left", bbox_to_anchor=(0, 1.45)
    )
    return figure


def _coactivation(numbers: dict[str, Any], census: Census) -> Figure:
    """Of the tokens that chose the row's expert, the share that also chose the column's."""
    shown, E = census.shown, census.experts
    figure = Figure(figsize=(1.0 + 3.4 * len(shown), 3.6), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False)
    chance = 100 * numbers["chance"]["coactivation"]
    tables = [100 * np.array(numbers["coactivation"][n]) for n in shown]
    most = max(float(t.max()) for t in tables)
    image = None
    for axes, n, table in zip(grid[0], shown, tables, strict=True):
        shown_EE = np.where(np.eye(E, dtype=bool), np.nan, table)
        image = axes.imshow(shown_EE, cmap="magma", vmin=0, vmax=max(most, 2 * chance))
        axes.set_title(f"layer {census.layers[n]}", fontsize=9)
        _experts(axes, census)
    grid[0, 0].set_ylabel("expert")
    if image is not None:
        figure.colorbar(image, ax=grid, label=f"% also chosen (chance {chance:.1f})")
    return figure


def _vocabulary(numbers: dict[str, Any], census: Census) -> Figure:
    """The mean largest share of a token id that one expert took, by layer, against a random routing."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for colour, (kind, rows) in zip(_colours(3), numbers["vocabulary"].items(), strict=True):
        axes.plot(census.layers, [100 * r["share"] for r in rows], "o-", color=colour, label=f"{kind} token")
        axes.plot(
            census.layers, [100 * r["chance"] for r in rows], "--", color=colour, linewidth=1, alpha=0.7
        )
    axes.plot([], [], "--", color=_GREY, label="the same, random routing")
    axes.set_xticks(census.layers)
    axes.set_xlabel("layer")
    axes.set_ylabel("% of an id's tokens in one expert")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _load(numbers: dict[str, Any], census: Census) -> Figure:
    """Each expert's share of the choices, sorted, by layer."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    chosen_LE = census.chosen_LCE.sum(1).double()
    share_LE = (100 * chosen_LE / chosen_LE.sum(1, keepdim=True).clamp(min=1)).sort(1, descending=True).values
    for colour, layer, row in zip(_colours(len(share_LE)), census.layers, share_LE, strict=True):
        axes.plot(row.numpy(), color=colour, linewidth=1.2, label=f"layer {layer}")
    axes.axhline(100 / census.experts, color=_GREY, linestyle="--", linewidth=1, label="even")
    axes.set_xlabel("experts, busiest first")
    axes.set_ylabel("% of choices")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _saturation(numbers: dict[str, Any], census: Census) -> Figure:
    """How much of the last checkpoint's routing the earlier ones had, a line for each layer."""
    labels = list(numbers["saturation"])
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, key, chance, title in (
        (grid[0], "top_k", "saturation", f"top-{numbers['top_k']}"),
        (grid[1], "top_1", "saturation_top1", "top-1"),
    ):
        for n, colour in zip(range(len(census.layers)), _colours(len(census.layers)), strict=True):
            values = [100 * numbers["saturation"][label][key][n] for label in labels]
            axes.plot(range(len(labels)), values, "o-", color=colour, label=f"layer {census.layers[n]}")
        axes.axhline(
            100 * numbers["chance"][chance], color=_GREY, linestyle="--", linewidth=1, label="chance"
        )
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 102)
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("% of choices as in the last")
    grid[1].legend(frameon=False, fontsize=7, ncols=2)
    return figure


def _colours(count: int) -> Sequence[Any]:
    if count <= 10:
        return [matplotlib.colormaps["tab10"](i) for i in range(count)]
    return [matplotlib.colormaps["viridis"](i / (count - 1)) for i in range(count)]


def _experts(axes: Axes, census: Census) -> None:
    stride = max(1, census.experts // 16)
    places = range(0, census.experts, stride)
    if census.names:
        axes.set_xticks(places, [census.names[e] for e in places], fontsize=7, rotation=60, ha="right")
    else:
        axes.set_xticks(places, [str(e) for e in places], fontsize=7)
        axes.set_xlabel("expert")
