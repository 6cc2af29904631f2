"""Verbs about this machine: what it is, how fast a recipe runs on it."""

import json

import typer

from moesaic.cli.arguments import AsJson, RecipeName, recipe_of
from moesaic.terminal import flat, print_report, print_rows, say


def env(as_json: AsJson = False) -> None:
    """Versions, hardware, and this machine's measured matmul rate and bandwidth."""
    import torch

    from moesaic.files import human_size
    from moesaic.machine import describe, matmul_rate, read_bandwidth

    facts = describe()
    device = "cuda" if facts["gpus"] else "cpu"
    rates = {name: matmul_rate(getattr(torch, name), device=device) for name in ("float32", "bfloat16")}
    facts["matmul_gflops"] = {name: round(rate / 1e9) for name, rate in rates.items()}
    facts["read_gb_per_s"] = round(read_bandwidth(device=device) / 1e9, 1)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    if "memory_bytes" in facts:
        facts["memory_bytes"] = human_size(facts["memory_bytes"])
    print_rows([(key, flat(value)) for key, value in facts.items()], False)


def bench(
    context: typer.Context,
    recipe: RecipeName = "makemoe",
    as_json: AsJson = False,
) -> None:
    """Training and decoding speed of a recipe, beside this machine's own limits."""
    from moesaic.train.measure import bench as measure

    chosen = recipe_of(recipe, context.args)
    print_report(measure(chosen, say), as_json, title=f"{chosen.name} on this machine")
