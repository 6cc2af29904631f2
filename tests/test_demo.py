"""The demo, made small: what it prints, with and without the dense models beside it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.train.demo import run_demo

SMALL = [
    *(
        "data.max_chars=20000",
        "data.vocab_size=300",
        "train.steps=2",
        "train.batch_size=2",
        "train.seq_len=16",
    ),
    *("model.layers=1", "model.width=16", "model.context=64", "model.attention.heads=2"),
    *("model.experts.hidden=8", "eval.every=2", "checkpoint.every=2", "train.precision=fp32"),
]


@pytest.mark.parametrize("compare", [False, True])
def test_the_demo_trains_and_shows_what_came_of_it(tmp_path: Path, compare: bool) -> None:
    out, run = io.StringIO(), tmp_path / "run"
    console = Console(file=out, width=120)
    assert run_demo(console, [*SMALL, f"out={run}"], compare=compare, program="bin/moesaic") == run
    printed = out.getvalue()
    assert "held-out loss" in printed
    assert "favourite expert of each domain" in printed
    assert f"bin/moesaic generate {run}" in " ".join(printed.split())
    assert {path.name for path in (run / "plots").iterdir()} == {"loss.png", "load.png", "domains.png"}
    assert ("dense, same steps" in printed) is compare
    assert ("dense, same time" in printed) is compare
    assert printed.count("the sparse model") == (2 if compare else 0)
