"""Where numbers go when the disk is full or an outside tracker fails, and when progress is shown."""

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import tiny

from moesaic.errors import RecipeError, ResourceError
from moesaic.train import logger
from moesaic.train.logger import Logger

ROW = {"step": 1, "split": "train", "loss": 1.0, "tokens": 64, "time": 0.1}


class Fragile:
    """A tracker that works until the end."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, finished: bool) -> None:
        raise ConnectionError("gone away")


def made(folder: Path, *words: str) -> tuple[Logger, io.StringIO]:
    said = io.StringIO()
    return Logger(folder, tiny(folder, *words), Console(file=said, width=200)), said


def test_a_full_disk_is_one_sentence_and_closing_after_it_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log, _ = made(tmp_path)
    with pytest.raises(ResourceError, match="the last checkpoint is good"):
        log.row(ROW)
    log.close(finished=False)


def test_a_tracker_that_fails_at_the_end_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logger.TRACKERS, "mlflow", lambda run, recipe, step: Fragile())
    log, said = made(tmp_path, "tracker=mlflow")
    log.start_tracker(0)
    log.row(ROW)
    log.close(finished=True)
    assert "could not be told of the end: gone away" in said.getvalue()


def test_a_tracker_that_cannot_be_opened_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(run: Path, recipe: object, step: int) -> Fragile:
        raise ConnectionError("no server")

    monkeypatch.setitem(logger.TRACKERS, "mlflow", broken)
    log, _ = made(tmp_path, "tracker=mlflow")
    with pytest.raises(RecipeError, match=r"'mlflow' cannot be opened: no server; or set tracker=none"):
        log.start_tracker(0)


@pytest.mark.parametrize(("terminal", "times"), [(False, [3]), (True, [1, 2, 3])])
def test_progress_is_shown_at_its_pace_and_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, times: list[int]
) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(logger.time, "monotonic", lambda: next(clock))
    log, said = made(tmp_path, "train.steps=3")
    log.in_terminal, log.last_shown = terminal, 99.0
    shown = []
    for step in (1, 2, 3):
        if log.due(step):
            shown.append(step)
            log.progress(step, 1.25, 1000.0, "balance 1.50")
    assert shown == times
    if not terminal:
        assert "step 3/3  loss 1.2500  1,000 tokens/s" in said.getvalue()
        assert "balance 1.50" in said.getvalue()
