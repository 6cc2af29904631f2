"""Where a run's numbers go: metrics.jsonl always, the terminal, and a tracker if asked for."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moesaic.config import flatten
from moesaic.errors import RecipeError
from moesaic.files import explained
from moesaic.machine import peak_memory
from moesaic.train.recipe import Recipe
from moesaic.train.rundir import cut_rows


class Tracker(Protocol):
    """An outside experiment tracker. ``values`` are plain numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None: ...


class TensorBoardTracker:
    """Event files in the run directory's ``tensorboard`` folder."""

    def __init__(self, run: Path, recipe: Recipe, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError("tracker = 'tensorboard' needs: pip install 'moesaic[track]'") from None
        # Points after ``step`` are made again by a resumed run.
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


class MLflowTracker:
    """Parameters and metrics as makeMoE logs them, in ``mlflow.db`` beside the run directories.

    MLFLOW_TRACKING_URI, where set, decides instead. See them with
    ``mlflow ui --backend-store-uri sqlite:///runs/mlflow.db``.
    """

    def __init__(self, run: Path, recipe: Recipe, step: int) -> None:
        try:
            import mlflow
        except ImportError:
            raise RecipeError("tracker = 'mlflow' needs: pip install 'moesaic[track]'") from None
        self.mlflow = mlflow
        store = run.resolve().parent / "mlflow.db"
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{store}"))
        mlflow.set_experiment(recipe.name)
        known = run / "mlflow_run"
        run_id = known.read_text().strip() if known.exists() else None
        active = mlflow.start_run(run_id=run_id, run_name=run.name)
        if run_id is None:
            known.write_text(active.info.run_id + "\n")
            params = {k: str(v)[:500] for k, v in flatten(recipe).items() if v is not None}
            mlflow.log_params(params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({k.replace("/", "_"): v for k, v in values.items()}, step=step)

    def close(self, finished: bool) -> None:
        self.mlflow.end_run("FINISHED" if finished else "KILLED")


TRACKERS: dict[str, Callable[[Path, Recipe, int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "mlflow": MLflowTracker,
}


class Logger:
    """Writes rows to ``metrics.jsonl`` and the tracker, and shows progress on the terminal.

    In a terminal one line is rewritten in place at most every ``live_every`` seconds; in a pipe a plain
    line is printed at most every ``plain_every`` seconds. NO_COLOR and TERM=dumb are honoured by rich.
    """

    live_every, plain_every = 0.1, 10.0  # seconds

    def __init__(self, run: Path, recipe: Recipe, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self.run = run
        self.files: dict[str, IO[str]] = {}
        self.recipe = recipe
        self.tracker: Tracker | None = None
        self.live = Live(console=self.console, refresh_per_second=8, transient=True)
        self.in_terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        if self.in_terminal:
            self.live.start()
        self.last_shown = 0.0
        self.pace: list[tuple[float, int]] = []

    def start_tracker(self, step: int) -> None:
        """Open the tracker that the recipe names, if any; the run stands at ``step``.

        Raises RecipeError where it cannot be opened: better now than after a day without it.
        """
        name = self.recipe.tracker
        if name == "none":
            return
        try:
            self.tracker = TRACKERS[name](self.run, self.recipe, step)
        except RecipeError:
            raise
        except Exception as error:  # whatever an outside service raises
            raise RecipeError(f"tracker = {name!r} cannot be opened: {error}; or set tracker=none") from None

    def row(self, row: Mapping[str, Any]) -> None:
        """Append one row (``step``, ``split``, ``loss``, ``tokens``, ``time``, …)."""
        self._append("metrics.jsonl", row)
        if self.tracker is not None:
            split = row["split"]
            numbers = {
                f"{split}_{k}": float(v) for k, v in row.items() if isinstance(v, int | float) and k != "step"
            }
            try:
                self.tracker.log(row["step"], numbers)
            except Exception as error:  # whatever an outside service raises must not cost the run
                self.say(f"the tracker failed and is left out from here on: {error}")
                self.tracker = None

    def load(self, row: Mapping[str, Any]) -> None:
        """Append one row of expert loads to the side file ``load.jsonl``."""
        self._append("load.jsonl", row)

    def cut(self, step: int) -> None:
        """Drop the rows of steps after ``step``, which are made again."""
        for name in ("metrics.jsonl", "load.jsonl"):
            if name in self.files:
                self.files.pop(name).close()
            cut_rows(self.run / name, step)

    def due(self, step: int) -> bool:
        """Whether to show progress now: a terminal's line lives, a pipe gets one in a while."""
        since = time.monotonic() - self.last_shown
        return step == self.recipe.train.steps or since >= (
            self.live_every if self.in_terminal else self.plain_every
        )

    def progress(self, step: int, loss: float, tokens_per_second: float, more: str) -> None:
        """Show where training is, and a few words more."""
        now = self.last_shown = time.monotonic()
        self.pace = [*self.pace[-49:], (now, step)]
        (then, first), (last, latest) = self.pace[0], self.pace[-1]
        eta = (last - then) / (latest - first) * (self.recipe.train.steps - step) if latest > first else None
        parts = [
            f"step {step}/{self.recipe.train.steps}",
            f"loss {loss:.4f}",
            f"{tokens_per_second:,.0f} tokens/s",
            f"ETA {_clock(eta)}",
            f"{peak_memory() / 2**20:,.0f} MB",
        ]
        line = "  ".join([*parts, more]).rstrip()
        if self.in_terminal:
            self.live.update(Text(line, style="cyan"))
        else:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line above the progress line. The text is not markup."""
        self.console.print(Text(text), soft_wrap=True)

    def close(self, finished: bool) -> None:
        """Stop showing and writing; a tracker is told whether the run came to its end."""
        if self.in_terminal:
            self.live.stop()
        for file in self.files.values():
            with suppress(OSError):  # a row that did not fit was reported when it was written
                file.close()
        if self.tracker is not None:
            try:
                self.tracker.close(finished)
            except Exception as error:  # the run itself is whole
                self.say(f"the tracker could not be told of the end: {error}")

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        # Opened at the first row and again after a cut, which puts another file in its place.
        file = self.files.get(name)
        with explained(self.run, f"{self.run / name} cannot be written", "the last checkpoint is good"):
            if file is None:
                file = self.files[name] = (self.run / name).open("a", encoding="utf-8")
            file.write(json.dumps(dict(row)) + "\n")
            file.flush()


def _clock(time_left: float | None) -> str:
    if time_left is None:
        return "…"
    seconds = int(time_left)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"
