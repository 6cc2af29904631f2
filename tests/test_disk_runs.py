"""Runs with experts on disk, when something goes otherwise than planned: damage, stops, starts that fail."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from disk_experts import E, disk, routed
from test_disk_experts import train, weights_of
from tiny_runs import command, run_tiny, stop_during, words

import moesaic
from moesaic.errors import CheckpointError, DataError, MoesaicError, RecipeError, ResourceError, Stopped
from moesaic.model.experts import ExpertOptions, Experts
from moesaic.model.routers import SmartOptions, build_router
from moesaic.offload import pool as pool_module
from moesaic.offload.experts import DiskExperts
from moesaic.offload.optimizer import SparseExpertAdamW
from moesaic.offload.store import Index, Store
from moesaic.weights.indexes import indexes

ON_DISK = ["offload.memory=60kB", "optim.lr=1e-2", "checkpoint.every=2"]


def flip(run: Path, index: Index, layer: int, expert: int) -> None:
    """Change one byte of an expert's record."""
    store = Store.open(run / "experts")
    store.close()
    with (run / "experts" / "records.bin").open("r+b") as file:
        file.seek(int(index.place[layer, expert]) * store.record + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def ids() -> torch.Tensor:
    return torch.arange(12)[None]


def test_a_damaged_expert_is_never_used_and_harms_no_other(tmp_path: Path) -> None:
    ours = disk(tmp_path / "store", slots=4)
    train(ours, range(1, 20))
    ours.pool.write_back()
    sound = weights_of(ours)
    place = int(ours.store.index.place[0, 0])
    ours.pool.forget()
    with (tmp_path / "store" / "records.bin").open("r+b") as file:
        file.seek(place * ours.store.record + 9)
        file.write(b"\x55\xaa\x55")
    for _ in range(3):
        with pytest.raises(CheckpointError, match="expert 0 of layer 0 is damaged"):
            ours.gather(0, [0], torch.float32)
        ours.prefetch(0, [0])
    for expert in range(1, E):
        assert all(map(torch.is_tensor, ours.gather(0, [expert], torch.float32)))
    assert not ours.pool._busy_S.any()
    assert sound.shape == weights_of(disk(tmp_path / "other")).shape


def test_a_promise_that_the_system_cannot_keep_is_a_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pool_module.mmap, "mmap", refuse)
    with pytest.raises(ResourceError, match=r"the system gives no .* give less"):
        disk(tmp_path / "store")


def test_a_start_that_failed_can_be_made_again(tmp_path: Path) -> None:
    with pytest.raises(MoesaicError, match="hold 0 experts"):
        run_tiny(tmp_path, "run", "offload.memory=100")
    with pytest.raises(MoesaicError, match="matches no parameter"):
        run_tiny(tmp_path, "run", *ON_DISK, 'train.freeze=["nothing"]')
    run = run_tiny(tmp_path, "run", *ON_DISK, "seed=5", "model.experts.hidden=8")
    assert moesaic.load(run).config.experts.hidden == 8


def test_one_process_trains_a_run_twice_and_opens_it_often(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", *ON_DISK)
    assert run_tiny(tmp_path, "run", *ON_DISK, "train.steps=8", resume=True) == run
    opened = Path("/proc/self/fd")
    if not opened.is_dir():
        pytest.skip("nothing here lists the open files")
    moesaic.load(run)
    before = len(list(opened.iterdir()))
    for _ in range(3):
        moesaic.load(run)
    assert len(list(opened.iterdir())) <= before


def test_no_checkpoint_that_is_there_loses_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stepped aside while it was replaced, and the finished model when checkpoints are removed."""
    run = run_tiny(tmp_path, "run", *ON_DISK)
    aside = run / "checkpoints" / ".step-00000006.old-99999"
    (run / "checkpoints" / "step-00000006").rename(aside)
    assert {path.name for path in indexes(run)} == {"step-00000004", aside.name, "model"}
    finished = moesaic.load(run / "model").logits(ids())
    shutil.rmtree(run / "checkpoints")
    stop_during(monkeypatch, 4)
    with pytest.raises(Stopped):
        run_tiny(tmp_path, "run", *ON_DISK, "checkpoint.every=1", resume=True)
    assert torch.equal(moesaic.load(run / "model").logits(ids()), finished)


def test_memory_is_not_switched_on_or_off_in_a_run(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", *ON_DISK)
    for name, given in (("run", ["offload.memory=none"]), ("plain", ["offload.memory=60kB"])):
        if name == "plain":
            run_tiny(tmp_path, "plain", "optim.lr=1e-2", "checkpoint.every=2")
        with pytest.raises(RecipeError, match=r"offload\.memory \(experts that are in memory"):
            run_tiny(tmp_path, name, "optim.lr=1e-2", "checkpoint.every=2", *given, resume=True)
    assert moesaic.load(run).logits(ids()).isfinite().all()


def test_settings_that_cannot_be_made_up_for_are_refused() -> None:
    stack = torch.nn.Parameter(torch.ones(3, 2, 2))
    for betas in ((0.9, 0.0), (0.9, 0.5), (0.9, 0.8)):
        with pytest.raises(ValueError, match="what an idle expert missed"):
            SparseExpertAdamW([stack], betas=betas)


def test_two_passes_before_one_backward() -> None:
    """The stack is brought forward for the second pass without harm to the graph of the first."""
    bank = Experts(ExpertOptions(count=E, hidden=6), 8)
    for p in bank.parameters():
        torch.nn.init.normal_(p, std=0.3)
    twin = copy.deepcopy(bank)
    optimizer = SparseExpertAdamW(list(bank.parameters()), lr=1e-2)
    optimizer.watch(bank)
    dense = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    for step in range(4):
        one, other = routed(3, step), routed(3, 50 + step)
        for each, stepped in ((bank, optimizer), (twin, dense)):
            stepped.zero_grad()
            (each(*one).square().sum() + each(*other).square().sum()).backward()
            stepped.step()
    optimizer.catch_up_all()
    for p, q in zip(bank.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.data, q.data, rtol=1e-4, atol=1e-5)


def test_a_budget_under_a_cold_temperature_stays_finite() -> None:
    router = build_router(SmartOptions(keys="product", budget=8), 32, 64)
    torch.nn.init.normal_(router.weight)
    router.log_temperature.data.fill_(-3.0)
    router.train()
    for seed in range(20):
        torch.manual_seed(seed)
        routing = router(torch.randn(6, 32), None)
        assert routing.weight_TK.isfinite().all()
        assert len(routing.expert_TK[routing.keep_TK].unique()) <= 8


def test_a_domain_too_short_for_a_curriculum_is_named_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(words(400), encoding="utf-8")
    (tmp_path / "short.txt").write_text("the old", encoding="utf-8")
    paths = ", ".join(f"{name} = '{tmp_path / name}.txt'" for name in ("long", "short"))
    with pytest.raises(DataError, match="short"):
        run_tiny(tmp_path, "run", f"data.path={{{paths}}}", "curriculum.order=fixed")
    assert not (tmp_path / "run" / "recipe.toml").exists()


def test_the_store_is_shown_checked_and_made_small(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, "run", *ON_DISK)
    said = command("store", "info", str(run))
    assert said.returncode == 0
    assert "as of" in said.stdout
    assert "after 6 updates" in said.stdout
    said = command("store", "verify", str(run))
    assert (said.returncode, "records are sound" in said.stderr + said.stdout) == (0, True)
    assert command("store", "compact", str(run)).returncode == 0
    found = indexes(run)
    older = found[run / "checkpoints" / "step-00000004"]
    newer = found[run / "model"]
    layer, expert = next(
        (layer, e)
        for layer in range(2)
        for e in range(4)
        if older.place[layer, e] >= 0 and older.place[layer, e] != newer.place[layer, e]
    )
    flip(run, older, layer, expert)
    said = command("store", "verify", str(run))
    assert said.returncode == 4
    assert (
        f"step-00000004: {run}/experts/records.bin: expert {expert} of layer {layer} is damaged"
        in said.stderr
    )
    (run / "experts" / "records.bin").rename(tmp_path / "away")
    for verb in (["store", "info"], ["store", "verify"], ["store", "compact"]):
        said = command(*verb, str(run))
        assert (said.returncode, "records.bin: is missing" in said.stderr) == (4, True)
    assert not (run / "experts" / "records.bin").exists()
    (tmp_path / "away").rename(run / "experts" / "records.bin")
    shutil.rmtree(run / "checkpoints")
    assert command("store", "info", str(run)).returncode == 0


def test_a_batch_that_is_not_finite_leaves_experts_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Skipped and rolled back, a run ends where one without that batch does."""
    real = DiskExperts.take_factors
    calls = {"n": 0}

    def poisoned(self: DiskExperts) -> object:
        taken = real(self)
        if taken:
            calls["n"] += 1
            if calls["n"] == 3:
                taken[0][1].dy_RD.fill_(float("nan"))
        return taken

    ends = []
    for on_nan in ("skip", "rollback"):
        calls["n"] = 0
        with monkeypatch.context() as patch:
            patch.setattr(DiskExperts, "take_factors", poisoned)
            run = run_tiny(tmp_path, on_nan, *ON_DISK, f"train.on_nan={on_nan}")
        ends.append(moesaic.load(run).logits(ids()))
    assert torch.equal(*ends)
    assert ends[0].isfinite().all()
