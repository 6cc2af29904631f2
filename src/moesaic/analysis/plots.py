"""Pictures of a run and of a routing, as PNG. Drawn without a display.

Shape legend: L sparse layers, E experts, T tokens, C domains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

_DPI = 130
_MAX_TOKENS = 120


def loss_curve(train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]], path: Path) -> None:
    """Training and held-out loss against steps; rows are those of metrics.jsonl."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
        axes.plot(steps, losses, color="#9db4c8", linewidth=1, label="train (mean since the row before)")
    if val:
        steps, losses = [r["step"] for r in val], [r["loss"] for r in val]
        axes.plot(steps, losses, color="#c2452d", marker="o", markersize=3.5, label="held out")
        axes.annotate(
            f"{losses[-1]:.4f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(-6, 9),
            ha="right",
        )
        # The first steps fall from log(vocabulary) and would flatten everything after them.
        shown = losses + [r["loss"] for r in train[len(train) // 20 :]]
        margin = 0.05 * (max(shown) - min(shown)) + 1e-3
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    if train or val:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=_DPI)


def load_heatmap(counts_LE: Tensor, layers: Sequence[int], path: Path) -> None:
    """Share of each sparse layer's choices that each expert took, over the held-out text."""
    share = (counts_LE.double() / counts_LE.sum(1, keepdim=True).clamp(min=1)).numpy()
    L, E = share.shape
    figure = Figure(
        figsize=(max(5.0, min(16.0, 1.6 + 0.55 * E)), max(2.6, 1.4 + 0.36 * L)), layout="constrained"
    )
    axes = figure.subplots()
    image = axes.imshow(share, aspect="auto", cmap="magma", vmin=0, vmax=max(2 / E, float(share.max())))
    _label_experts(axes, E)
    axes.set_yticks(range(L), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title(f"expert load on held-out text (even = {1 / E:.3f})", fontsize=10)
    if E <= 16:
        for i in range(L):
            for j in range(E):
                bright = share[i, j] > 0.6 * image.norm.vmax  # type: ignore[operator]
                axes.text(
                    j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=7,
                    color="black" if bright else "white",
                )  # fmt: skip
    figure.colorbar(image, ax=axes, label="share of choices")
    figure.savefig(path, dpi=_DPI)


def specialisation_heatmap(
    share_LCE: Tensor, layers: Sequence[int], domains: Sequence[str], path: Path
) -> None:
    """For every sparse layer, how much more or less often each domain uses each expert than all
    domains do together."""
    L, C, E = share_LCE.shape
    usual_L1E = share_LCE.mean(1, keepdim=True)
    excess = (share_LCE - usual_L1E).numpy() * 100
    limit = max(5.0, float(abs(excess).max()))
    columns = min(4, L)
    rows = -(-L // columns)
    figure = Figure(figsize=(1.6 + 3.0 * columns, 0.9 + (0.55 + 0.33 * C) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    image = None
    for index, axes in enumerate(grid.flat):
        if index >= L:
            axes.axis("off")
            continue
        image = axes.imshow(excess[index], aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(f"layer {layers[index]}", fontsize=9)
        axes.set_yticks(range(C), domains if index % columns == 0 else [""] * C, fontsize=8)
        _label_experts(axes, E, name=index // columns == rows - 1)
    if image is not None:
        figure.colorbar(image, ax=grid, label="percentage points\nabove usual")
    figure.savefig(path, dpi=_DPI)


def token_heatmap(
    experts_LT: Tensor,
    confidence_LT: Tensor,
    tokens: Sequence[str],
    layers: Sequence[int],
    num_experts: int,
    path: Path,
) -> None:
    """The first choice of every token in every sparse layer: colour is the expert, strength its
    weight. Long texts show their first 120 tokens."""
    experts, confidence = experts_LT[:, :_MAX_TOKENS].numpy(), confidence_LT[:, :_MAX_TOKENS].numpy()
    tokens = list(tokens)[:_MAX_TOKENS]
    L, T = experts.shape
    figure = Figure(figsize=(max(5.0, 1.4 + 0.24 * T), max(2.4, 1.6 + 0.3 * L)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab20" if num_experts > 10 else "tab10"]
    picture = colours(experts % colours.N)
    picture[..., 3] = 0.25 + 0.75 * confidence.clip(0, 1)
    axes.imshow(picture, aspect="auto")
    for i in range(L):
        for j in range(T):
            axes.text(j, i, str(experts[i, j]), ha="center", va="center", fontsize=6.5)
    axes.set_xticks(
        range(T), [t.replace("$", r"\$") for t in tokens], rotation=90, fontsize=7, family="monospace"
    )
    axes.set_yticks(range(L), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_title("first expert of each token; the stronger the colour, the more of its weight", fontsize=9)
    figure.savefig(path, dpi=_DPI)


def _label_experts(axes: Axes, E: int, name: bool = True) -> None:
    stride = max(1, E // 16)
    axes.set_xticks(range(0, E, stride), [str(e) for e in range(0, E, stride)], fontsize=8)
    if name:
        axes.set_xlabel("expert")
