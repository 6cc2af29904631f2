"""``moesaic eval MODEL``: benchmarks of the harness, beside each other."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from moesaic.cli.arguments import AsJson, memory_of
from moesaic.errors import RecipeError
from moesaic.terminal import out, say


def eval_model(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL…", help="One model or several, to compare.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas: arc_easy,hellaswag,…")
    ] = "",
    local: Annotated[
        list[str] | None,
        typer.Option(
            help="mmlu=FOLDER, gsm8k=FILE, contrast=shipped: tasks from local files; may be given again."
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples shown; as the task says if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most of each task.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FILE: text or conversations of your own that were held out; may be given again."
        ),
    ] = None,
    answers: Annotated[
        int | None,
        typer.Option(min=1, help="With --data: answer conversations in so many tokens; exact match."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure models, ours in process: moesaic eval MODEL --tasks arc_easy,piqa, or --data code=code.txt."""
    from moesaic.analysis.harness import Suite, rows_of
    from moesaic.analysis.held_out import OwnData
    from moesaic.lm import described, load

    suite = Suite(
        [name for name in tasks.split(",") if name], _named("--local", local, "mmlu=FOLDER"), shots, limit
    )
    own = OwnData(_named("--data", data, "NAME=FILE"), limit, answers)
    if not (suite.tasks or suite.local or own.files):
        raise RecipeError("give --tasks NAME,NAME, --local mmlu=FOLDER or --data NAME=FILE")
    if answers is not None and not own.files:
        raise RecipeError("--answers is about the conversations of --data: give that too")
    if (shots is not None) and not (suite.tasks or suite.local):
        raise RecipeError("--shots is about tasks: give --tasks or --local too")
    if twice := sorted({*suite.tasks, *suite.local} & {*own.files}):
        raise RecipeError(f"--data {twice[0]}=…: a task has that name; choose another")
    if suite.tasks or suite.local:
        suite.check()
    if own.files:  # before anything is computed
        say(f"{sum(map(len, own.examples.values())):,} rows of --data")
    words = [str(path) for path in models if "=" in str(path) and not path.exists()]
    memory, results = memory_of(words), {}
    models = [path for path in models if str(path) not in words]
    if not models:
        raise RecipeError("name a model: moesaic eval MODEL …")
    for path in models if memory is not None else []:  # before the first is measured
        if not described(path)[0].moe_layers:
            raise RecipeError(f"{path}: has no experts to leave on disk; leave offload.memory out")
    for path in models:
        say(f"evaluating {path}")
        lm = load(path, memory=memory)
        found = suite.run(lm, say) if suite.tasks or suite.local else {}
        results[str(path)] = {**found, **own.run(lm, say)}
    if as_json:
        typer.echo(json.dumps(results))
        return
    table = Table(box=None, title="evaluation", title_justify="left", title_style="bold")
    table.add_column("task")
    for name in results:
        table.add_column(Text(name), justify="right")
    for label, cells in rows_of(results):
        table.add_row(Text(label), *cells)
    out.print(table)


def _named(option: str, words: list[str] | None, form: str) -> dict[str, Path]:
    """NAME=PATH words as paths by name. Raises RecipeError."""
    named: dict[str, Path] = {}
    for word in words or []:
        name, equals, path = word.partition("=")
        if not equals or not name or name in named:
            raise RecipeError(f"{option} {word}: write {form}, each name once")
        named[name] = Path(path).expanduser()
    return named
