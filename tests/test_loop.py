"""The loop: what a run learns and writes down, what changes nothing, what freezes, what diverges."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import rows, run_tiny, stop_during, tiny, tiny_file, weights

from moesaic.config import flatten
from moesaic.errors import DataError, DivergedError, RecipeError, Stopped
from moesaic.lm import load
from moesaic.train import loop, session
from moesaic.train.objectives import Loss
from moesaic.train.recipe import load_recipe
from moesaic.train.rundir import read_rows
from moesaic.weights.checkpoint import newest_valid, read_checkpoint, read_tensors, step_of

PNG = b"\x89PNG\r\n\x1a\n"
ROUTED = ["balance", "dead", "drop", "load_entropy"]


def test_a_run_learns_and_leaves_all_it_should(tmp_path: Path) -> None:
    words = ["train.steps=60", "eval.every=30", "checkpoint.every=25", "optim.lr=0.01"]
    run = run_tiny(tmp_path, "run", *words, drawn=True)
    every = read_rows(run / "metrics.jsonl")
    train = [row for row in every if row["split"] == "train"]
    val = [row for row in every if row["split"] == "val"]
    assert [row["step"] for row in train] == list(range(1, 61))
    assert [row["step"] for row in val] == [30, 60]
    assert train[0]["loss"] == pytest.approx(math.log(19), abs=0.3)
    assert val[1]["loss"] < val[0]["loss"] < train[0]["loss"] - 0.2
    for row in every:
        assert {"step", "split", "loss", "tokens", "time"} <= row.keys()
        assert row["tokens"] == row["step"] * 4 * 16
    for row in train:
        assert {"tokens_per_second", "lr", "grad_norm", "loss_balance", *ROUTED} <= row.keys()
        assert 1 <= row["balance"] <= 4
        assert 0 <= row["load_entropy"] <= 1
        assert row["drop"] == 0
        assert row["lr"] == 0.01
    assert [row["time"] for row in every] == sorted(row["time"] for row in every)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000050", "step-00000060"]
    assert (run / "latest").read_text() == "step-00000060\n"
    assert load_recipe(str(run)) == tiny(tmp_path, f"out={run}", *words)
    assert "python" in json.loads((run / "env.json").read_text())
    pictures = sorted(p.name for p in (run / "plots").iterdir())
    assert {"loss.png", "load.png"} <= set(pictures)
    assert all((run / "plots" / name).read_bytes().startswith(PNG) for name in pictures)
    exported, newest = read_checkpoint(run / "model"), read_checkpoint(run / "checkpoints" / "step-00000060")
    for name, tensor in exported.tensors["model.safetensors"].items():
        assert torch.equal(tensor, newest.tensors["model.safetensors"][name])
    assert "optimizer.safetensors" not in exported.tensors


def test_a_dropped_share_shows_in_the_log(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "model.router.capacity_factor=0.5", "train.steps=2")
    assert all(0.4 < row["drop"] <= 0.75 for row in rows(run, "train"))


@pytest.mark.parametrize("extra", [[], ["model.dropout=0.2", "model.router.kind=noisy_top_k"]])
def test_one_seed_is_one_run_and_another_another(extra: list[str], tmp_path: Path) -> None:
    runs = [run_tiny(tmp_path, f"run{i}", f"seed={seed}", *extra) for i, seed in enumerate([5, 5, 6])]
    assert weights(runs[0]) == weights(runs[1])
    assert rows(runs[0], "train") == rows(runs[1], "train")
    assert rows(runs[0], "val") == rows(runs[1], "val")
    assert weights(runs[0])["model.safetensors"] != weights(runs[2])["model.safetensors"]


def test_looking_at_a_run_changes_nothing_in_it(tmp_path: Path) -> None:
    noisy = ["model.dropout=0.2", "model.router.kind=noisy_top_k", "train.steps=7"]
    calm = run_tiny(tmp_path, "calm", *noisy)
    for number, looked in enumerate(
        (
            ["eval.every=2", "eval.sample=5"],
            ["checkpoint.every=1", "checkpoint.keep=3"],
            ["train.log_every=3", "eval.batch_size=1", "tracker=none"],
        )
    ):
        assert weights(run_tiny(tmp_path, f"looked{number}", *noisy, *looked)) == weights(calm)


def test_rows_between_logged_steps_are_averaged(tmp_path: Path) -> None:
    each = rows(run_tiny(tmp_path, "each", "train.steps=7"), "train")
    some = rows(run_tiny(tmp_path, "some", "train.steps=7", "train.log_every=3"), "train")
    assert [row["step"] for row in some] == [3, 6, 7]
    for row, part in zip(some, (each[:3], each[3:6], each[6:]), strict=True):
        assert row["loss"] == pytest.approx(sum(r["loss"] for r in part) / len(part), rel=1e-5)
        assert row["grad_norm"] == part[-1]["grad_norm"]


def test_a_batch_in_two_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """The balance loss is not a mean over tokens, so it is left out here."""
    words = ["loss.balance=0", "train.steps=1", "optim.kind=rmsprop", "optim.weight_decay=0"]
    norms, found = [], []
    for parts in (1, 2, 4):
        run = run_tiny(tmp_path, f"run{parts}", *words, f"train.accumulate={parts}")
        norms.append(rows(run, "train")[0])
        checkpoint = newest_valid(run, print)
        assert checkpoint is not None
        found.append(read_tensors(checkpoint, "optimizer.safetensors"))
    for row in norms[1:]:
        assert row["loss"] == pytest.approx(norms[0]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norms[0]["grad_norm"], rel=1e-4)
    squares = [name for name in found[0] if name.endswith("/square_avg")]
    assert len(squares) > 10
    for other in found[1:]:
        for name in squares:  # 0.05 times the squared gradient, after one step
            torch.testing.assert_close(other[name], found[0][name], rtol=2e-3, atol=1e-10)


def test_the_gradient_is_clipped_to_the_norm_given(tmp_path: Path) -> None:
    words = ["train.steps=1", "optim.kind=rmsprop", "optim.weight_decay=0"]
    states = []
    for clip in ("none", "0.001"):
        run = run_tiny(tmp_path, f"run-{clip}", *words, f"train.clip={clip}")
        checkpoint = newest_valid(run, print)
        assert checkpoint is not None
        tensors = read_tensors(checkpoint, "optimizer.safetensors")
        total = sum(t.double().sum() for n, t in tensors.items() if n.endswith("/square_avg"))
        states.append((float(total / 0.05) ** 0.5, rows(run, "train")[0]["grad_norm"]))
    (whole, norm), (clipped, same_norm) = states
    assert whole == pytest.approx(norm, rel=1e-4)
    assert clipped == pytest.approx(0.001, rel=1e-3)
    assert same_norm == norm  # the log has the norm before it was clipped


def test_the_loss_free_bias_moves_by_its_rate(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "model.router={kind='loss_free', update_rate=0.125}", "loss.balance=0")
    bias_LE = torch.stack(
        [gate.e_score_correction_bias for gate in (m.gate for m in load(run).model.moe_modules())]  # type: ignore[misc]
    )
    assert bias_LE.abs().max() > 0
    assert torch.equal(bias_LE / 0.125, (bias_LE / 0.125).round())
    assert (bias_LE.abs() <= 6 * 0.125).all()


FREEZING: dict[str, tuple[list[str], Callable[[str], bool]]] = {
    "experts": (
        ["train.freeze=['model.layers.*.mlp.experts.*', 'lm_head.*']"],
        lambda name: ".experts." not in name and "lm_head" not in name,
    ),
    "all-but-routers": (["train.only=['*.gate.weight']"], lambda name: name.endswith(".gate.weight")),
    "both-keys": (
        ["train.only=['*.mlp.*']", "train.freeze=['*.gate.*']"],
        lambda name: ".mlp." in name and ".gate." not in name,
    ),
}


@pytest.mark.parametrize("case", FREEZING)
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_frozen_stays_bit_for_bit(
    kind: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, trains = FREEZING[case]
    options = [f"optim.kind={kind}", "optim.weight_decay=0.1", "train.steps=2", "checkpoint.every=1", *words]
    run = run_tiny(tmp_path, "run", *options)
    torch.manual_seed(1337)
    start = session.build_session(tiny(tmp_path, *options), lambda text: None).model.state_dict()
    newest = newest_valid(run, print)
    assert newest is not None
    end = read_tensors(newest, "model.safetensors")
    for name, before in start.items():
        assert torch.equal(before, end[name]) != trains(name), name
    said = capsys.readouterr().err
    assert "trains " in said
    assert "frozen  " in said
    optimised = {name.rpartition("/")[0] for name in read_tensors(newest, "optimizer.safetensors")}
    assert optimised == {name for name in start if trains(name)}


@pytest.mark.parametrize("key", ["freeze", "only"])
def test_a_pattern_that_matches_nothing_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"train\.{key}: 'model\.blocks\.\*' matches no parameter"):
        run_tiny(tmp_path, "run", f"train.{key}=['model.blocks.*']")


def test_nothing_left_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing to train"):
        run_tiny(tmp_path, "run", "train.freeze=['*']")


def make_nan(patch: pytest.MonkeyPatch, steps: set[int], *, in_backward: bool = False) -> None:
    """Spoil the loss (or its gradient alone) of ``steps``."""
    real_build, real_step, now = loop.build_session, loop.train_step, [0]

    def stepped(made: Any, step: int) -> Any:
        now[0] = step
        return real_step(made, step)

    def build(*given: Any) -> Any:
        made = real_build(*given)
        real = made.objective

        def objective(model: Any, batch: Any) -> Loss:
            loss = real(model, batch)
            if now[0] not in steps:
                return loss
            if not in_backward:
                return Loss(loss.total * math.nan, loss.parts, loss.routings)
            weight = model.lm_head.weight
            return Loss(loss.total + (weight - weight.detach()).abs().sqrt().sum(), loss.parts, loss.routings)

        made.objective = objective
        return made

    patch.setattr(loop, "train_step", stepped)
    patch.setattr(loop, "build_session", build)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_stops(
    in_backward: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        make_nan(patch, {5}, in_backward=in_backward)
        with pytest.raises(DivergedError, match="step 5") as caught:
            run_tiny(tmp_path, "run", "checkpoint.every=2")
    assert caught.value.exit_code == 5
    newest = newest_valid(tmp_path / "run", print)
    assert newest is not None
    assert step_of(newest) == 4
    run_tiny(tmp_path, "run", "checkpoint.every=2", resume=True)
    calm = run_tiny(tmp_path, "calm")
    assert weights(tmp_path / "run") == weights(calm)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_batch_is_passed_over(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["checkpoint.every=2", f"train.on_nan={policy}", "model.dropout=0.1", "optim.kind=muon"]
    whole = weights(run_tiny(tmp_path, "whole", *words))
    make_nan(monkeypatch, {4})
    run = run_tiny(tmp_path, "run", *words)
    skipped = rows(run, "skipped")
    assert [(row["step"], row["loss"]) for row in skipped] == [(4, None)]
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 5, 6]
    # Stopped and resumed after it, the batch is still passed over.
    stop_during(monkeypatch, 5)
    with pytest.raises(Stopped):
        run_tiny(tmp_path, "stopped", *words)
    assert weights(run_tiny(tmp_path, "stopped", *words, resume=True)) == weights(run)
    assert weights(run)["model.safetensors"] != whole["model.safetensors"]


def test_rollback_without_a_checkpoint_is_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nan(monkeypatch, {2})
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        run_tiny(tmp_path, "run", "train.on_nan=rollback")


def test_too_many_bad_batches_are_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_nan(monkeypatch, set(range(1, 100)))
    with pytest.raises(DivergedError, match="passed over"):
        run_tiny(tmp_path, "run", "train.on_nan=skip", "train.steps=60")


def test_bf16_runs_and_keeps_float32_weights(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", "train.precision=bf16", "train.steps=3")
    assert {p.dtype for p in load(run).model.parameters()} == {torch.float32}
    exact = run_tiny(tmp_path, "exact", "train.precision=fp32", "train.steps=3")
    one, two = rows(run, "train"), rows(exact, "train")
    assert one[-1]["loss"] != two[-1]["loss"]
    assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], abs=0.05)


@pytest.mark.parametrize("pattern", ["D", "MD"])
def test_dense_and_mixed_models_train(pattern: str, tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", f"model.pattern={pattern}", "train.steps=2", drawn=True)
    assert ("balance" in rows(run, "train")[0]) == ("M" in pattern)
    assert (run / "plots" / "loss.png").read_bytes().startswith(PNG)


def test_a_corpus_shorter_than_the_window_is_refused_before_training(tmp_path: Path) -> None:
    tiny_file(tmp_path)
    (tmp_path / "text.txt").write_text("too short\n" * 3)
    with pytest.raises(DataError, match=r"train\.seq_len=16 needs 17"):
        run_tiny(tmp_path, "run")


def test_a_vocabulary_below_the_tokenizers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="vocab_size = 5"):
        run_tiny(tmp_path, "run", "model.vocab_size=5")
    assert load(run_tiny(tmp_path, "wide", "model.vocab_size=64", "train.steps=1")).config.vocab_size == 64


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_tracker_gets_parameters_and_metrics(tracker: str, tmp_path: Path) -> None:
    pytest.importorskip(tracker)
    run = run_tiny(tmp_path, "run", f"tracker={tracker}", "train.steps=3")
    wanted = [row["loss"] for row in rows(run, "train")]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run / "tensorboard")).Reload()
        got = [event.value for event in events.Scalars("train_loss")]
        assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]
    else:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
        run_id = (run / "mlflow_run").read_text().strip()
        assert client.get_run(run_id).data.params["train.steps"] == "3"
        flat = {k for k, v in flatten(load_recipe(str(run))).items() if v is not None}
        assert client.get_run(run_id).data.params.keys() == flat
        history = sorted(client.get_metric_history(run_id, "train_loss"), key=lambda m: m.step)
        got = [metric.value for metric in history]
        assert client.get_run(run_id).info.status == "FINISHED"
    assert got == pytest.approx(wanted, rel=1e-6)
