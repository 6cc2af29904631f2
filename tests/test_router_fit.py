"""Closed-form routers against their oracles, and the walk through the layers against the whole model."""

from pathlib import Path

import pytest
import torch
from dense_donors import TEXT, change, dense
from torch import Tensor

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.errors import DataError, RecipeError  # noqa: E402
from moesaic.merge import router_fit  # noqa: E402
from moesaic.merge.merge import merge, plan_merge  # noqa: E402
from moesaic.merge.options import MergeOptions, RouterInit  # noqa: E402
from moesaic.merge.router_fit import Calibration, fit_prompts, fit_ridge, labelled, prompted  # noqa: E402
from moesaic.merge.tensors import Merged  # noqa: E402

T, D, E = 6, 5, 3


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_fit, "multiplies_bf16", lambda _: False)


def inputs_of(calibration: Calibration, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*calibration.ids_NT[b].shape, D, generator=generator) + 0.5 for b in calibration.batches()
    ]


def test_ridge_is_weighted_least_squares() -> None:
    calibration = labelled([torch.zeros(n, T, dtype=torch.int64) for n in (4, 1, 2)])
    inputs = inputs_of(calibration)
    told = fit_ridge(inputs, calibration, RouterInit(ridge=0.3))
    x = torch.cat(inputs).flatten(0, 1).double()
    owner = torch.tensor([0] * 4 * T + [1] * T + [2] * 2 * T)
    weight = 1 / (3 * torch.bincount(owner)[owner].double())
    y = torch.nn.functional.one_hot(owner, E).double() - 1 / E
    gram = x.T @ (weight[:, None] * x)
    rhs = x.T @ (weight[:, None] * y)
    w = torch.linalg.inv(gram + 0.3 * gram.trace() / D * torch.eye(D)) @ rhs
    expected = w.T / (x @ w).std()
    torch.testing.assert_close(told.double(), expected, rtol=1e-4, atol=1e-5)
    assert (x @ told.double().T).std().item() == pytest.approx(1, abs=1e-4)


def test_prompts_are_mean_inputs_less_those_of_negative_ones_centred() -> None:
    words = [torch.arange(n) for n in (2, 3, 1, 4, 2)]
    calibration = prompted([([words[0], words[1]], [words[2]]), ([words[3]], []), ([words[4]], [])])
    inputs = inputs_of(calibration)
    assert len(inputs) == 1
    told = fit_prompts(inputs, calibration, RouterInit(scale=2.0))
    h = inputs[0]
    rows = [
        torch.cat([h[0, :2], h[1, :3]]).mean(0) - h[2, :1].mean(0),
        h[3, :4].mean(0),
        h[4, :2].mean(0),
    ]
    w = torch.stack(rows)
    w = torch.nn.functional.normalize(w - w.mean(0), dim=1)
    logits = torch.cat([h[n, : len(word)] @ w.T for n, word in enumerate(words)])
    torch.testing.assert_close(told, w * 2 / logits.std(), rtol=1e-4, atol=1e-5)


def donors(root: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    base = dense(root / "base")
    texts = {"mill": "the old mill turns and turns by the stream\n", "sums": "1, 2, 3. 3, 2, 1. 2, 1, 3.\n"}
    experts = {}
    for seed, (name, text) in enumerate(texts.items(), 1):
        file = root / f"{name}.txt"
        file.write_text(text * 10)
        expert = change(base, root / name, seed, ".mlp.", "post_attention_layernorm")
        experts[name] = {"model": str(expert), "calibration": str(file)}
    return base, experts


def options(root: Path, init: str, **more: object) -> MergeOptions:
    base, experts = donors(root)
    router = {"init": init, "tokens": 256, "seq_len": 32}
    return MergeOptions.model_validate({"base": str(base), "experts": experts, "router": router, **more})


@pytest.mark.parametrize("init", ["ridge", "ridge-unlabelled"])
def test_the_loss_of_the_walk_is_that_of_the_whole_model(init: str, tmp_path: Path) -> None:
    said: list[str] = []
    made = options(tmp_path, init)
    merge(made, tmp_path / "out", said.append)
    lm = moesaic.load(tmp_path / "out")
    ids = [lm.tokenizer.encode(Path(e.calibration[0]).read_text()) for e in made.experts.values()]
    windows = torch.cat([torch.tensor(i[:256]).view(-1, 32) for i in ids]).long()
    logits = lm.logits(windows)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert said[-2] == f"loss on the calibration text: {loss:.4f} nats per token"


@pytest.mark.parametrize("init", ["ridge", "ridge-unlabelled"])
def test_texts_of_any_length_go_together(init: str, tmp_path: Path) -> None:
    made = options(tmp_path, init)
    (tmp_path / "sums.txt").write_text("1, 2, 3. 2, 1.")
    merge(made, tmp_path / "out", lambda _: None)
    assert moesaic.load(tmp_path / "out").config.moe_layers


def test_ridge_sends_each_text_to_its_expert(tmp_path: Path) -> None:
    merge(options(tmp_path, "ridge"), tmp_path / "out", lambda _: None)
    lm = moesaic.load(tmp_path / "out")
    for expert, name in enumerate(("mill", "sums")):
        ids = torch.tensor(lm.tokenizer.encode((tmp_path / f"{name}.txt").read_text())[None, :64]).long()
        chosen = torch.stack([r.expert_TK[:, 0] for r in lm.routing(ids)])
        assert (chosen == expert).float().mean() > 0.9


def test_unlabelled_targets_are_those_of_the_dense_experts_losses(tmp_path: Path) -> None:
    made = options(tmp_path, "ridge-unlabelled")
    plan = plan_merge(made)
    ids = torch.randint(20, (3, 40), generator=torch.Generator().manual_seed(0))
    calibration = router_fit.unlabelled(plan.experts, ids, lambda _: None)
    near = []
    for expert in plan.experts:
        logits = moesaic.load(expert.directory).logits(ids).log_softmax(-1)
        loss = -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
        rows = [[loss[n, max(0, t - 16) : t + 17].mean() for t in range(39)] for n in range(3)]
        near.append(torch.tensor([[*row, row[-1]] for row in rows]))
    expected = (-torch.stack(near, -1)).softmax(-1)
    torch.testing.assert_close(calibration.whose, expected, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_mixture_of_least_loss(tmp_path: Path) -> None:
    said: list[str] = []
    made = options(tmp_path, "ridge", shared="auto")
    merge(made, tmp_path / "out", said.append)
    tried = [float(line.rsplit(" ", 1)[1]) for line in said if line.startswith("shared: ")]
    assert len(tried) == 5
    final = next(line for line in said if line.startswith("loss on"))
    assert float(final.split()[5]) == pytest.approx(min(tried), abs=1e-4)


def test_prompts_make_a_router(tmp_path: Path) -> None:
    base, experts = donors(tmp_path)
    for name, text in (("mill", "the old mill"), ("sums", "1, 2, 3.")):
        experts[name] = {"model": experts[name]["model"], "positive": [text, text[:5]]}  # type: ignore[dict-item]
    made = MergeOptions.model_validate({"base": str(base), "experts": experts})
    assert made.router_mode() == "prompts"
    merge(made, tmp_path / "out", lambda _: None)
    lm = moesaic.load(tmp_path / "out")
    first = [r.expert_TK[:, 0].float().mean() for r in lm.routing(lm.ids("the old mill"))]
    second = [r.expert_TK[:, 0].float().mean() for r in lm.routing(lm.ids("1, 2, 3."))]
    assert sum(first) < sum(second)


def test_a_layer_at_a_time_is_all_that_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most: list[int] = []
    fill = Merged.fill

    def counted(self: Merged, module: torch.nn.Module, prefix: str) -> None:
        fill(self, module, prefix)
        most.append(sum(p.numel() for p in module.parameters() if not p.is_meta))

    monkeypatch.setattr(Merged, "fill", counted)
    made = options(tmp_path, "ridge")
    merge(made, tmp_path / "out", lambda _: None)
    whole = plan_merge(made).config.parameters().total
    assert max(most) < whole / 2


def test_bad_calibration_is_named(tmp_path: Path) -> None:
    made = options(tmp_path, "ridge")
    (tmp_path / "sums.txt").write_text("1")
    with pytest.raises(DataError, match="sums: its calibration text has 1 tokens"):
        merge(made, tmp_path / "out", lambda _: None)
    assert not (tmp_path / "out").exists()
    (tmp_path / "sums.txt").write_text("ÿ")
    with pytest.raises(DataError, match="ÿ"):
        merge(made, tmp_path / "out", lambda _: None)
    for name in ("mill", "sums"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"has no tokenizer\.json"):
        merge(made, tmp_path / "out", lambda _: None)
