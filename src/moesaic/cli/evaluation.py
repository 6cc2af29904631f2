"""``moesaic eval MODEL``: benchmarks of the harness, beside each other."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from moesaic.cli.arguments import AsJson
from moesaic.errors import RecipeError
from moesaic.terminal import out, say


def eval_model(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL…", help="One model or several, to compare.")],
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas: arc_easy,hellaswag,…")
    ] = "",
    local: Annotated[
        list[str] | None,
        typer.Option(help="mmlu=FOLDER or gsm8k=FILE: the same tasks from local files; may be given again."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples shown; as the task says if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions at most of each task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure models by lm-evaluation-harness, with ours in process: moesaic eval MODEL --tasks
    arc_easy,piqa."""
    from moesaic.analysis.harness import evaluate_tasks, rows_of

    files = {}
    for word in local or []:
        name, equals, path = word.partition("=")
        if not equals or name in files:
            raise RecipeError(f"--local {word}: write mmlu=FOLDER or gsm8k=FILE, each once")
        files[name] = Path(path).expanduser()
    names = [name for name in tasks.split(",") if name]
    if not names and not files:
        raise RecipeError("give --tasks NAME,NAME or --local mmlu=FOLDER")
    results = evaluate_tasks(models, names, files, shots, limit, say)
    if as_json:
        typer.echo(json.dumps(results))
        return
    table = Table(box=None, title="evaluation", title_justify="left", title_style="bold")
    table.add_column("task")
    for path in results:
        table.add_column(Text(path), justify="right")
    for label, cells in rows_of(results):
        table.add_row(Text(label), *cells)
    out.print(table)
