"""Run directories: which one is taken, and on what text a run may go on."""

from pathlib import Path

import pytest
from tiny_runs import run_tiny, tiny, words

from moesaic.errors import CheckpointError
from moesaic.train.rundir import choose_directory


def test_a_start_that_failed_does_not_use_up_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny(tmp_path).model_copy(update={"out": None, "name": "first"})
    folder = choose_directory(recipe, resume=False)
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    assert choose_directory(recipe, resume=False) == folder
    (folder / "recipe.toml").touch()
    assert choose_directory(recipe, resume=False).name == "first-2"


def test_a_run_does_not_go_on_with_another_text(tmp_path: Path) -> None:
    run_tiny(tmp_path, "run", "train.steps=2")
    text = Path(str(tiny(tmp_path).data.path))
    text.write_text(words(400, seed=9), encoding="utf-8")
    with pytest.raises(CheckpointError, match="another text"):
        run_tiny(tmp_path, "run", "train.steps=4", resume=True)
