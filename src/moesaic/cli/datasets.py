"""Verbs that make data."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moesaic.cli.arguments import AsJson, RecipeName, recipe_of
from moesaic.errors import RecipeError
from moesaic.terminal import print_rows, say


def build(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A data recipe: a TOML file, or roles or olmoe-sft.")
    ],
    target: Annotated[Path, typer.Option("--out", help="The JSONL to write; never overwritten.")] = Path(
        "roles.jsonl"
    ),
    as_json: AsJson = False,
) -> None:
    """One JSONL of instructions from public datasets: moesaic data build roles [local=DIR seed=7 …]."""
    from moesaic.data.build import build as run_build
    from moesaic.data.build import build_recipe

    taken = run_build(build_recipe(recipe, context.args), target, say)
    rows = [
        (
            f"{one.source.domain}: {one.source.name}",
            f"{len(one.rows):,} rows ({one.source.rows:,} wanted) of {one.looked:,} looked at, "
            f"{one.passed_over:,} passed over" + (f"; {one.problem}" if one.problem else ""),
        )
        for one in taken
    ]
    total = sum(len(one.rows) for one in taken)
    print_rows([*rows, ("written", f"{total:,} rows, shuffled: {target}")], as_json)


def prepare(context: typer.Context, recipe: RecipeName, as_json: AsJson = False) -> None:
    """Tokenise a recipe's text, as training would before its first step: moesaic data prepare RECIPE [a.b=c
    …]. Interrupted, the same command goes on where it was."""
    from dataclasses import asdict

    from moesaic.data.pretrain import prepare as run_prepare
    from moesaic.data.store import Shard
    from moesaic.train.interrupt import Interrupt

    chosen = recipe_of(recipe, context.args)
    with Interrupt() as interrupt:
        store = run_prepare(
            chosen.data, seq_len=chosen.train.seq_len, progress=say, stopped=lambda: interrupt.requested
        )
    for note in store.notes:
        say(note)
    if as_json:
        parts = [asdict(shard) for shard in store.shards if isinstance(shard, Shard)]
        typer.echo(json.dumps({"tokens": store.train_tokens, "domains": parts}))
        return
    rows = [(s.domain, f"{s.train_tokens:,} training tokens of {s.tokens:,}") for s in store.shards]
    print_rows([*rows, ("all", f"{store.train_tokens:,} training tokens")], False, chosen.name)


def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="roles or olmoe-sft.")] = "roles",
) -> None:
    """Print a data recipe that comes along, to copy and change."""
    from moesaic.config import read_text
    from moesaic.data.build import builtin_mixes

    mixes = builtin_mixes()
    if name not in mixes:
        raise RecipeError(f"{name!r} is no data recipe; there are {', '.join(mixes)}")
    typer.echo(read_text(mixes[name]), nl=False)
