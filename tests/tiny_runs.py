"""Runs small enough to train in a test: a text made up on the spot and a recipe of a few thousand weights."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.train import loop
from moesaic.train.loop import train
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import read_rows

WORDS = ["the", "old", "river", "runs", "past", "a", "stone", "mill", "and", "turns", "its", "wheel"]
ENTRY = [sys.executable, "-c", "from moesaic.cli import main; main()"]

TOML = """
name = "tiny"
[data]
source = "files"
path = {path}
tokenizer = "char"
[model]
layers = 2
width = 16
context = 16
[model.attention]
heads = 2
[model.experts]
count = 4
hidden = 12
[model.router]
kind = "top_k"
top_k = 2
[train]
steps = 6
batch_size = 4
seq_len = 16
log_every = 1
device = "cpu"
[optim]
lr = 3e-3
[eval]
every = 100
sample = 0
[checkpoint]
every = 100
"""


def words(count: int, seed: int = 0) -> str:
    """A text of ``count`` words in lines; 15 different characters or so."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(-(-count // 8))]
    return "".join(lines)


def tiny_file(folder: Path) -> Path:
    """The recipe file in ``folder``, beside the text that it trains on."""
    file = folder / "tiny.toml"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text(words(1200), encoding="utf-8")
        file.write_text(TOML.format(path=json.dumps(str(folder / "text.txt"))), encoding="utf-8")
    return file


def tiny(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(tiny_file(folder)), overrides)


def run_tiny(folder: Path, name: str, *overrides: str, resume: bool = False, drawn: bool = False) -> Path:
    """Train the tiny recipe into ``folder/name``; its pictures, slower than its steps, only if ``drawn``."""
    with pytest.MonkeyPatch.context() as patch:
        for picture in () if drawn else ("loss_curve", "load_heatmap", "specialisation_heatmap"):
            patch.setattr(loop, picture, lambda *given: None)
        return train(tiny(folder, f"out={folder / name}", *overrides), resume=resume)


def stop_during(patch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process SIGTERM, as an operator would, while step ``step`` is computed."""
    real: Callable[..., Any] = loop.train_step

    def stepped(session: Any, at: int) -> Any:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(session, at)

    patch.setattr(loop, "train_step", stepped)


def weights(run: Path) -> dict[str, bytes]:
    """The bytes of the newest checkpoint's model and optimizer."""
    newest = run / "checkpoints" / (run / "latest").read_text().strip()
    return {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def rows(run: Path, split: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    timed = ("time", "tokens_per_second")
    every = [row for row in read_rows(run / "metrics.jsonl") if row["split"] == split]
    return [{k: v for k, v in row.items() if k not in timed} for row in every]


def command(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """``moesaic`` in a process of its own."""
    return subprocess.run([*ENTRY, *arguments], capture_output=True, text=True, check=False, **more)


def quiet_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return read_rows(run / "metrics.jsonl")
