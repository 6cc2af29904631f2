"""``moesaic demo``: train, then show what came of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.analysis.prompt import route_prompt
from moesaic.analysis.routing import mutual_information, specialisation
from moesaic.lm import load
from moesaic.train.loop import train
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import read_rows

PROMPT = 'def read(path):\n    """Return the text of a file."""\n'


@dataclass(frozen=True)
class Outcome:
    """What a comparison needs to know of one finished run."""

    name: str
    run: Path
    steps: int
    loss: float
    seconds: float
    total: int
    active: int


def run_demo(
    out: Console, overrides: Sequence[str] = (), *, compare: bool = False, program: str = "moesaic"
) -> Path:
    """Train the ``demo`` recipe and print held-out loss, a sample, a routing table and what to try.

    ``program`` is how the commands to try next call moesaic. With ``compare``, two dense models of equal
    active size follow: one for the same number of steps, one for the same wall-clock time (its steps are
    set from the measured pace of the former).
    """
    recipe = load_recipe("demo", overrides)
    run = train(recipe)
    sparse = _outcome("sparse (MoE)", run)
    outcomes = [sparse]
    if compare:
        outcomes.append(_dense("dense, same steps", recipe, run, "dense-steps", sparse.steps))
        pace = outcomes[1].seconds / outcomes[1].steps
        steps = max(1, round(sparse.seconds / pace))
        outcomes.append(_dense("dense, same time", recipe, run, "dense-time", steps))
    _show_losses(out, run)
    _show_sample(out, run)
    _show_routing(out, run)
    if compare:
        _show_comparison(out, outcomes)
    _show_next(out, run, program)
    return run


def _dense(name: str, recipe: Recipe, run: Path, suffix: str, steps: int) -> Outcome:
    """Train the dense twin of ``recipe`` beside ``run``."""
    twin = recipe.model_copy(
        update={
            "name": suffix,
            "out": str(run / suffix),
            "model": recipe.model.dense_twin(),
            "train": recipe.train.model_copy(update={"steps": steps}),
        }
    )
    return _outcome(name, train(twin))


def _outcome(name: str, run: Path) -> Outcome:
    last = _last_evaluation(run)
    counts = load(run).config.parameters()
    return Outcome(name, run, last["step"], last["loss"], last["time"], counts.total, counts.active)


def _last_evaluation(run: Path) -> dict[str, Any]:
    return [row for row in read_rows(run / "metrics.jsonl") if row["split"] == "val"][-1]


def _show_losses(out: Console, run: Path) -> None:
    last = _last_evaluation(run)
    out.print(
        Text(f"\nheld-out loss {last['loss']:.4f} nats per token after {last['time']:.0f} s", style="bold")
    )
    domains = {key.removeprefix("loss/"): value for key, value in last.items() if key.startswith("loss/")}
    for domain, loss in domains.items():
        out.print(Text(f"  {domain:10} {loss:.4f}"))


def _show_sample(out: Console, run: Path) -> None:
    lm = load(run)
    text = lm.generate(PROMPT, max_new_tokens=120, temperature=0.7, top_p=0.95, seed=1)
    out.print(Text("\na sample (the prompt is the first two lines)", style="bold"))
    out.print(Text(PROMPT + text, style="green"), soft_wrap=True)


def _show_routing(out: Console, run: Path) -> None:
    """The routing table of the prompt, and how far experts have taken to domains."""
    out.print()
    out.print(route_prompt(load(run), PROMPT).layer_table())
    last = read_rows(run / "load.jsonl")[-1]
    domains = list(last["counts"])
    if len(domains) < 2:
        return
    import torch

    title = "favourite expert of each domain: its share there (and in all domains)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", justify="right")
    for domain in domains:
        table.add_column(domain)
    table.add_column("bits", justify="right")
    for index, layer in enumerate(last["layers"]):
        counts_CE = torch.tensor([last["counts"][domain][index] for domain in domains])
        share_CE = specialisation(counts_CE)
        usual_E = share_CE.mean(0)
        cells = []
        for row_E in share_CE:
            expert = int((row_E - usual_E).argmax())
            cells.append(f"{expert}: {100 * row_E[expert]:.0f}% ({100 * usual_E[expert]:.0f}%)")
        table.add_row(str(layer), *cells, f"{mutual_information(counts_CE):.2f}")
    out.print(table)
    most = math.log2(len(domains))
    out.print(
        Text(f"bits: what an expert's name tells about the domain; 0 is nothing, {most:.2f} everything")
    )


def _show_comparison(out: Console, outcomes: list[Outcome]) -> None:
    table = Table(title="sparse against dense of equal active size", title_justify="left", title_style="bold")
    for name in ("model", "parameters", "active", "steps", "seconds", "held-out loss"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for o in outcomes:
        table.add_row(
            o.name, f"{o.total:,}", f"{o.active:,}", f"{o.steps:,}", f"{o.seconds:.0f}", f"{o.loss:.4f}"
        )
    out.print(table)
    sparse, steps, seconds = (o.loss for o in outcomes)
    for label, dense in (("the same steps", steps), ("the same time", seconds)):
        verdict = "wins" if sparse < dense else "loses" if sparse > dense else "ties"
        out.print(Text(f"  at {label} the sparse model {verdict}: {sparse:.4f} against {dense:.4f}"))


def _show_next(out: Console, run: Path, program: str) -> None:
    out.print(Text(f"\nthe run: {run}  (pictures in {run / 'plots'})", style="bold"))
    out.print(Text("try next:"))
    for command in (
        f'generate {run} --prompt "class Queue:"',
        f'inspect {run} --prompt "class Queue:" --tokens --out routing.png',
        "train char      # Shakespeare, character by character",
    ):
        out.print(Text(f"  {program} {command}"), soft_wrap=True)
