"""Run directories: which one is taken, and on what text a run may go on."""

import os
from pathlib import Path

import pytest
from tiny_runs import rows, run_tiny, tiny, words

from moesaic.errors import CheckpointError, RecipeError, ResourceError
from moesaic.train.recipe import load_recipe
from moesaic.train.rundir import check_room, check_same_run, choose_directory


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


def test_a_run_goes_on_with_the_same_text_from_another_file(tmp_path: Path) -> None:
    run_tiny(tmp_path, "run", "train.steps=2")
    os.utime(str(tiny(tmp_path).data.path), (1, 1))
    run = run_tiny(tmp_path, "run", "train.steps=3", f"data.cache={tmp_path / 'elsewhere'}", resume=True)
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3]


def test_to_resume_a_run_directory_means_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/tiny", "runs/tiny-2"):
        run_tiny(tmp_path, name, "train.steps=2")
    recipe = load_recipe("runs/tiny", resume=True)
    assert choose_directory(recipe, resume=True) == Path("runs/tiny")
    copied = (tmp_path / "runs/tiny").rename(tmp_path / "moved")  # its recipe still names the old place
    assert choose_directory(load_recipe(str(copied), resume=True), resume=True) == copied


def test_what_a_resumed_run_may_change(tmp_path: Path) -> None:
    recipe = tiny(tmp_path)
    for word in ("train.on_nan=skip", "train.log_every=3", "train.steps=9", "data.cache=x", "eval.every=7"):
        check_same_run(recipe, tiny(tmp_path, word), tmp_path)
    for word in ("optim.lr=1", "seed=3", "train.clip=1", "data.max_chars=100", "model.dropout=0.1"):
        with pytest.raises(RecipeError, match=word.partition("=")[0]):
            check_same_run(recipe, tiny(tmp_path, word), tmp_path)


def test_a_run_without_room_is_refused_before_it_starts(tmp_path: Path) -> None:
    check_room(tmp_path / "runs" / "new", 1)
    with pytest.raises(ResourceError, match=r"needs .* free"):
        check_room(tmp_path / "runs" / "new", 2**62)
