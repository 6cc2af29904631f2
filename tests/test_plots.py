"""Pictures are PNGs of a sensible size, for the smallest and for awkward input; nothing needs a display."""

import struct
from pathlib import Path

import pytest
import torch

from moesaic.analysis.plots import load_heatmap, loss_curve, specialisation_heatmap, token_heatmap


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize(
    ("train", "val"), [(60, 3), (1, 1), (0, 1), (1, 0), (0, 0)], ids=["usual", "one", "val", "train", "none"]
)
def test_loss_curve(train: int, val: int, tmp_path: Path) -> None:
    rows = [{"step": i + 1, "loss": 3.0 - i / 100} for i in range(max(train, val))]
    loss_curve(rows[:train], rows[:val], tmp_path / "loss.png")
    assert min(size(tmp_path / "loss.png")) > 200


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 4), (3, 64)])
def test_load_heatmap(layers: int, experts: int, tmp_path: Path) -> None:
    counts_LE = torch.arange(layers * experts).view(layers, experts)
    load_heatmap(counts_LE, range(layers), tmp_path / "load.png")
    assert min(size(tmp_path / "load.png")) > 200


def test_load_heatmap_of_layers_without_any_load(tmp_path: Path) -> None:
    load_heatmap(torch.zeros(2, 4, dtype=torch.int64), [1, 3], tmp_path / "load.png")
    assert min(size(tmp_path / "load.png")) > 200


@pytest.mark.parametrize(("layers", "domains", "experts"), [(1, 2, 2), (5, 3, 8)])
def test_specialisation_heatmap(layers: int, domains: int, experts: int, tmp_path: Path) -> None:
    share_LCE = torch.rand(layers, domains, experts, generator=torch.Generator().manual_seed(0))
    names = ["plain", "with $ and _", "élan"][:domains]
    specialisation_heatmap(share_LCE.softmax(-1), range(layers), names, tmp_path / "domains.png")
    assert min(size(tmp_path / "domains.png")) > 150


@pytest.mark.parametrize(
    "tokens", [["a"], ["$x^2$", "\\frac", "⏎", "\\x1b", " ", "<b>", "[red]"], ["t"] * 300]
)
def test_token_heatmap(tokens: list[str], tmp_path: Path) -> None:
    experts_LT = torch.arange(2 * len(tokens)).view(2, -1) % 12
    confidence_LT = torch.full(experts_LT.shape, 0.5)
    token_heatmap(experts_LT, confidence_LT, tokens, [0, 1], 12, tmp_path / "tokens.png")
    width, height = size(tmp_path / "tokens.png")
    assert 200 < width < 6000
    assert 200 < height < 6000
