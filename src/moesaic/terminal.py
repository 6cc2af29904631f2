"""What commands print to and read from: two consoles, tables of rows, progress lines, prompts."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.errors import DataError

if TYPE_CHECKING:
    from moesaic.train.measure import Report

out = Console()
err = Console(stderr=True)


def prompt_text(text: str) -> str:
    """The prompt, or standard input for ``-``."""
    where = "standard input" if text == "-" else "--prompt"
    # What of the command line is not UTF-8 reaches Python as lone surrogates.
    data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start})") from None


def program() -> str:
    """How this program was called, to show the next command with."""
    called = Path(sys.argv[0])
    if called.name != "moesaic" or shutil.which("moesaic") == str(called):
        return "moesaic"
    return os.path.relpath(called) if called.is_absolute() else str(called)


def write(text: str) -> None:
    """Text as it comes, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def say(text: str) -> None:
    """A sentence on progress, on standard error."""
    err.print(Text(text), soft_wrap=True)


def flat(value: Any) -> str:
    """A value of any kind on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def print_report(report: "Report", as_json: bool, title: str) -> None:
    """Print a report's rows, or its numbers as one JSON object."""
    if as_json:
        typer.echo(json.dumps(report.numbers))
    else:
        print_rows(report.rows, False, title)


def print_rows(rows: list[tuple[str, str]], as_json: bool, title: str | None = None) -> None:
    """Print (name, value) rows as a table, or as one JSON object."""
    if as_json:
        typer.echo(json.dumps({name: value for name, value in rows if name}))
        return
    table = Table(show_header=False, box=None, title=title, title_justify="left", title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    out.print(table)
