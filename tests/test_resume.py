"""A run that is stopped, killed or damaged and continued is the undisturbed run, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import ENTRY, command, rows, run_tiny, stop_during, tiny, tiny_file, weights

from moesaic.errors import CheckpointError, RecipeError, Stopped
from moesaic.files import RunLock
from moesaic.lm import load
from moesaic.train import loop
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import newest_valid, step_of

KILL_AND_RESUME = Path(__file__).parent.parent / "benchmarks" / "kill_and_resume.py"
# Everything that draws a random number or keeps a state between steps, each with another optimizer.
KINDS = {
    "adamw-dropout-noise": ["optim.kind=adamw", "model.dropout=0.2", "model.router.kind=noisy_top_k"],
    "muon-jitter": ["optim.kind=muon", "model.router={kind='smart', jitter=0.1}", "train.precision=bf16"],
    "rmsprop-loss-free": ["optim.kind=rmsprop", "model.router.kind=loss_free", "train.accumulate=2"],
    "expert-choice-tied": [
        "model.router.kind=expert_choice",
        "model.tied=true",
        "train.accumulate=4",
        "model.dropout=0.1",
    ],
}
SCHEDULE = ["schedule.kind=cosine", "schedule.warmup=2"]


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_anywhere_changes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*KINDS[kind], *SCHEDULE, "checkpoint.every=4", "eval.every=3"]
    calm = run_tiny(tmp_path, "calm", *words)
    for step in (1, 4):
        with monkeypatch.context() as patch:
            stop_during(patch, step)
            with pytest.raises(Stopped, match=f"after step {step} ") as caught:
                run_tiny(tmp_path, f"stopped{step}", *words)
        assert caught.value.exit_code == 75
        stopped = tmp_path / f"stopped{step}"
        newest = newest_valid(stopped, print)
        assert newest is not None
        assert step_of(newest) == step
        assert not (stopped / "model").exists()
        run_tiny(tmp_path, f"stopped{step}", *words, resume=True)
        assert weights(stopped) == weights(calm)
        for split in ("train", "val"):
            assert rows(stopped, split) == rows(calm, split)
        assert [row["step"] for row in read_rows(stopped / "load.jsonl")] == [3, 6]


def test_a_run_stopped_at_every_step_is_still_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*KINDS["adamw-dropout-noise"], *SCHEDULE]
    calm = run_tiny(tmp_path, "calm", *words)
    for step in range(1, 6):
        with monkeypatch.context() as patch:
            stop_during(patch, step)
            with pytest.raises(Stopped):
                run_tiny(tmp_path, "stopped", *words, resume=step > 1)
    run_tiny(tmp_path, "stopped", *words, resume=True)
    assert weights(tmp_path / "stopped") == weights(calm)


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "muon"])
def test_a_run_may_be_made_longer(kind: str, tmp_path: Path) -> None:
    """With a constant rate, for any other schedule depends on the number of steps."""
    words = [f"optim.kind={kind}", "model.dropout=0.1"]
    calm = run_tiny(tmp_path, "calm", *words, "train.steps=5")
    run_tiny(tmp_path, "grown", *words, "train.steps=2")
    grown = run_tiny(tmp_path, "grown", *words, "train.steps=5", resume=True)
    assert weights(grown) == weights(calm)
    assert load(grown).path == grown / "model"


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "train.steps=3")
    before, log = weights(run), (run / "metrics.jsonl").read_bytes()
    run_tiny(tmp_path, "run", "train.steps=3", resume=True)
    assert (weights(run), (run / "metrics.jsonl").read_bytes()) == (before, log)


def test_rows_after_the_checkpoint_are_made_again_not_doubled(tmp_path: Path) -> None:
    calm = run_tiny(tmp_path, "calm", "checkpoint.every=3")
    run = run_tiny(tmp_path, "run", "checkpoint.every=3")
    newest = newest_valid(run, print)
    assert newest is not None
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 6, "spl')  # torn by a crash
    run_tiny(tmp_path, "run", "checkpoint.every=3", resume=True)
    assert rows(run, "train") == rows(calm, "train")
    assert weights(run) == weights(calm)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model.width=32"], "model.width"),
        (["optim.lr=0.5"], "optim.lr"),
        (["seed=9"], "seed"),
        (["train.batch_size=8"], "train.batch_size"),
        (["model.router.kind=smart"], "model.router.kind"),
        (["data.val_fraction=0.2"], "data.val_fraction"),
        (["schedule.kind=cosine"], "schedule.kind"),
    ],
)
def test_resuming_as_another_run_is_refused(words: list[str], named: str, tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "train.steps=1")
    before = (run / "recipe.toml").read_bytes()
    with pytest.raises(RecipeError, match=named.replace(".", r"\.")) as caught:
        run_tiny(tmp_path, "run", "train.steps=1", *words, resume=True)
    assert caught.value.exit_code == 2
    assert (run / "recipe.toml").read_bytes() == before


def test_what_only_looks_may_change_when_resuming(tmp_path: Path) -> None:
    run_tiny(tmp_path, "run", "train.steps=1")
    words = ["train.steps=2", "eval.every=1", "checkpoint.every=1", "about='now longer'"]
    run = run_tiny(tmp_path, "run", *words, resume=True)
    assert [row["step"] for row in rows(run, "val")] == [1, 2]


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RecipeError, match="not empty"):
        run_tiny(tmp_path, "mine")
    with pytest.raises(RecipeError, match="no run to resume"):
        run_tiny(tmp_path, "mine", resume=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(RecipeError, match="is a file"):
        run_tiny(tmp_path, "mine/thesis.txt")
    with pytest.raises(RecipeError, match="no run to resume"):
        run_tiny(tmp_path, "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_run_is_not_trained_over(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "train.steps=1")
    before = weights(run)
    with pytest.raises(RecipeError, match="--resume"):
        run_tiny(tmp_path, "run", "train.steps=1")
    assert weights(run) == before


def test_what_a_kill_at_the_very_start_leaves_is_in_nobodys_way(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", "env.json", ".recipe.toml.tmp-4242"):
        (tmp_path / "run" / name).write_text("{}")
    assert (run_tiny(tmp_path, "run", "train.steps=1") / "model").is_dir()


def test_without_out_runs_are_numbered_and_the_newest_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny(tmp_path, "train.steps=1")
    assert [loop.train(recipe), loop.train(recipe)] == [Path("runs/tiny"), Path("runs/tiny-2")]
    assert loop.train(tiny(tmp_path, "train.steps=2"), resume=True) == Path("runs/tiny-2")
    with pytest.raises(RecipeError, match="no run to resume"):
        loop.train(tiny(tmp_path, "name=other"), resume=True)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "train.steps=1")
    before = weights(run)
    with RunLock(run):
        done = command(
            *["train", str(tiny_file(tmp_path)), f"out={run}", "train.steps=2", "--resume"],
        )
    assert done.returncode == 2
    assert f"in use by process {os.getpid()}" in done.stderr
    assert "Traceback" not in done.stderr
    assert weights(run) == before


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_newest_checkpoint_falls_back(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint.every=2", "model.dropout=0.1"]
    calm = run_tiny(tmp_path, "calm", *words)
    run = run_tiny(tmp_path, "run", *words)
    flip(run / "checkpoints" / "step-00000006" / name)
    capsys.readouterr()
    run_tiny(tmp_path, "run", *words, resume=True)
    said = capsys.readouterr().err
    assert "step-00000006 is damaged" in said
    assert name in said
    assert "falling back to step-00000004" in said
    assert weights(run) == weights(calm)


def test_when_every_checkpoint_is_damaged_the_file_is_named(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "checkpoint.every=3")
    for step in (3, 6):
        flip(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        run_tiny(tmp_path, "run", "checkpoint.every=3", resume=True)
    assert caught.value.exit_code == 4


@contextmanager
def training(folder: Path, *words: str) -> "Iterator[subprocess.Popen[str]]":
    """A long run in a process of its own that has saved at least once, killed at the end."""
    arguments = ["train", str(tiny_file(folder)), f"out={folder / 'run'}", "train.steps=100000", *words]
    child = subprocess.Popen([*ENTRY, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 600
        while not (folder / "run" / "latest").exists() and child.poll() is None:
            assert time.monotonic() < limit, "no checkpoint within ten minutes"
            time.sleep(0.01)
        yield child
    finally:
        child.kill()
        child.communicate()


def test_an_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    words = ["checkpoint.every=3", "model.dropout=0.1"]
    with training(tmp_path, *words) as child:
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=600)
        assert child.returncode == 75
    assert "--resume" in said
    assert "Traceback" not in said
    run = tmp_path / "run"
    newest = newest_valid(run, print)
    assert newest is not None
    reached = step_of(newest)
    assert [row["step"] for row in rows(run, "train")] == list(range(1, reached + 1))
    run_tiny(tmp_path, "run", *words, f"train.steps={reached + 2}", resume=True)
    assert weights(run) == weights(run_tiny(tmp_path, "calm", *words, f"train.steps={reached + 2}"))


def test_a_second_interrupt_ends_at_once_and_harms_nothing(tmp_path: Path) -> None:
    """The second signal comes while a step that the first waits for cannot end."""
    tiny_file(tmp_path)
    script = (
        "import sys, time\n"
        "from moesaic.train import loop\n"
        "real = loop.train_step\n"
        "def stuck(session, step):\n"
        "    if step == 4:\n"
        "        print('stuck', flush=True)\n"
        "        while True: time.sleep(0.01)\n"
        "    return real(session, step)\n"
        "loop.train_step = stuck\n"
        "loop.run(sys.argv[1], sys.argv[2:])\n"
    )
    run, words = tmp_path / "run", ["checkpoint.every=3", "model.dropout=0.1"]
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "tiny.toml"), f"out={run}", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "stuck\n"
    child.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # the first one waits for the step
        child.wait(0.3)
    child.send_signal(signal.SIGTERM)
    assert child.wait(600) == 128 + signal.SIGTERM
    child.stdout.close()
    run_tiny(tmp_path, "run", *words, resume=True)
    assert weights(run) == weights(run_tiny(tmp_path, "calm", *words))


def test_killing_and_resuming_in_short(tmp_path: Path) -> None:
    """Three kills, at least one of them inside a save; benchmarks/kill_and_resume.py makes fifty."""
    done = subprocess.run(
        [sys.executable, str(KILL_AND_RESUME), "--kills", "3", "--keep", str(tmp_path / "kept")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills: 3\n" in done.stdout
    assert "bit for bit" in done.stdout
    assert weights(tmp_path / "kept" / "undisturbed") == weights(tmp_path / "kept" / "killed")
