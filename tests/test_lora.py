"""LoRA: against the sum of the matrices, gradients included; merged, saved, resumed, refused."""

import json
from pathlib import Path

import pytest
import torch
from router_oracles import randomise
from test_experts import COUNTS, through
from test_experts import rows as some_rows
from tiny_runs import rows, run_tiny, stop_during, tiny, weights
from torch import Tensor, nn

import moesaic
from moesaic.errors import RecipeError, Stopped
from moesaic.export import export_model
from moesaic.model.dispatch import Layer
from moesaic.model.experts import ExpertOptions, Experts, FFNKind
from moesaic.model.grouped import Group
from moesaic.model.lora import LoRAOptions, add_lora, merge_lora
from moesaic.model.transformer import LanguageModel
from moesaic.train.loop import train


def adapted(kind: FFNKind, bias: bool, targets: list[str]) -> nn.Module:
    holder = nn.Module()
    holder.mlp = nn.Module()
    holder.mlp.experts = Experts(ExpertOptions(kind=kind, hidden=6, bias=bias, count=4), 5)
    add_lora(holder, LoRAOptions(rank=2, alpha=6.0, targets=targets))
    randomise(holder, seed=4)
    return holder.double()


def summed(bank: Experts) -> Experts:
    """A plain bank whose matrices are functions of the adapted one's parameters."""
    plain = Experts(ExpertOptions(kind=bank.kind, hidden=6, bias=bank.up_bias is not None, count=4), 5)
    adapter = bank.adapter
    assert adapter is not None
    first = "gate_up_proj" if bank.kind == "swiglu" else "up_proj"
    values: dict[str, Tensor] = {n: p for n, p in bank.named_parameters() if "adapter" not in n}
    for name, a, b in (
        (first, adapter.first_a, adapter.first_b),
        ("down_proj", adapter.down_a, adapter.down_b),
    ):
        if a is not None and b is not None:
            values[name] = values[name] + 3.0 * torch.einsum("eor,eri->eoi", b, a)
    for name in list(values):
        delattr(plain, name)
        setattr(plain, name, values[name])
    return plain


@pytest.mark.parametrize("counts_E", COUNTS)
@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu", "relu2"])
@pytest.mark.parametrize("which", ["*", "*down_proj", "*up_proj"])
def test_experts_give_what_the_summed_matrices_give_and_every_gradient(
    counts_E: list[int], kind: FFNKind, which: str
) -> None:
    bank = adapted(kind, bias=kind == "gelu", targets=[f"mlp.experts.{which}"]).mlp.experts
    leaves = list(bank.parameters())
    x = some_rows(sum(counts_E)).requires_grad_()
    outcomes = []
    for made in (bank, summed(bank)):
        y = through(made, x, counts_E)
        gradients = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *leaves], allow_unused=True)
        outcomes.append((y, [g if g is not None else torch.zeros(()) for g in gradients]))
    (y, ours), (expected, theirs) = outcomes
    torch.testing.assert_close(y, expected)
    for g, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, e.expand_as(g) if e.ndim == 0 else e)


def test_groups_of_experts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from moesaic.model import grouped

    bank, x = adapted("swiglu", False, ["*"]).mlp.experts, some_rows(10)
    whole = through(bank, x, [3, 1, 4, 2])
    monkeypatch.setattr(grouped, "_GROUP_BYTES", 1)
    assert isinstance(next(iter(grouped.groups([3, 1], Layer.of([3, 1]), 5, x))), Group)
    torch.testing.assert_close(through(bank, x, [3, 1, 4, 2]), whole)


def model_with_lora(folder: Path, targets: list[str]) -> LanguageModel:
    config = tiny(folder).model.model_copy(update={"vocab_size": 17})
    torch.manual_seed(0)
    model = LanguageModel(config)
    add_lora(model, LoRAOptions(rank=3, targets=targets))
    return model


def test_nothing_changes_at_first_and_merging_changes_nothing(tmp_path: Path) -> None:
    ids = torch.randint(0, 17, (2, 9))
    targets = ["*.self_attn.*_proj.weight", "*.mlp.experts.*", "lm_head.weight"]
    model = model_with_lora(tmp_path, targets)
    torch.manual_seed(0)
    plain = LanguageModel(model.config)
    torch.testing.assert_close(model(ids).logits_BTV, plain(ids).logits_BTV)
    for name, parameter in model.named_parameters():
        if name.endswith(("_b", "_a")):
            nn.init.normal_(parameter, std=0.3)
    changed = model(ids).logits_BTV
    assert not torch.allclose(changed, plain(ids).logits_BTV, atol=0.1)
    names = set(plain.state_dict())
    assert names < set(model.state_dict())
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits_BTV, changed, rtol=1e-3, atol=1e-4)
    merge_lora(model)  # nothing left to add
    torch.testing.assert_close(model(ids).logits_BTV, changed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("targets", "hint"),
    [
        (["*.q_projection"], "matches no matrix"),
        (["*.mlp.experts.*", "*.mlp.gate.weight"], r"'\*\.mlp\.gate\.weight' matches no matrix"),
        (["model.norm.weight"], "matches no matrix"),
    ],
)
def test_a_pattern_that_matches_nothing(tmp_path: Path, targets: list[str], hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        model_with_lora(tmp_path, targets)


def test_a_head_that_is_the_embedding_has_none(tmp_path: Path) -> None:
    config = tiny(tmp_path).model.model_copy(update={"vocab_size": 17, "tied": True})
    with pytest.raises(RecipeError, match=r"lm_head\.weight.* matches no matrix"):
        add_lora(LanguageModel(config), LoRAOptions(targets=["lm_head.weight"]))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_tiny(tmp_path_factory.mktemp("base"), "base", "model.attention.qk_norm=full")


LORA = ["train.lora.rank=4", "train.lora.alpha=8", "optim.lr=1e-2", "checkpoint.every=2"]


def test_only_what_is_named_trains_and_what_is_saved_opens_as_one(
    begun: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny(tmp_path, "lora", f"start={begun}", *LORA, 'train.only=["*.mlp.gate.weight"]')
    said = capfd.readouterr().err
    assert "trains  model.layers.*.mlp.experts.adapter.first_a" in said
    assert "trains  model.layers.*.mlp.gate.weight" in said
    assert "frozen  model.layers.*.mlp.experts.down_proj" in said
    before, after = moesaic.load(begun), moesaic.load(run)
    moved = {
        name
        for (name, a), b in zip(before.model.named_parameters(), after.model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "gate"}
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in moved} == kinds
    assert rows(run, "val")[-1]["loss"] < rows(begun, "val")[-1]["loss"]
    export_model(run, tmp_path / "exported")
    ids = torch.randint(0, 9, (1, 8))
    torch.testing.assert_close(moesaic.load(tmp_path / "exported").logits(ids), after.logits(ids))
    config = json.loads((run / "model" / "moesaic.json").read_text())
    assert config["lora"]["rank"] == 4


def test_resumed_it_is_bit_for_bit_the_undisturbed_run(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"start={begun}", *LORA]
    whole = run_tiny(tmp_path, "whole", *words)
    with monkeypatch.context() as patch:
        stop_during(patch, 3)
        with pytest.raises(Stopped):
            run_tiny(tmp_path, "parts", *words)
    parts = run_tiny(tmp_path, "parts", *words, resume=True)
    assert weights(parts) == weights(whole)


def test_it_can_be_begun_from_again(begun: Path, tmp_path: Path) -> None:
    first = run_tiny(tmp_path, "first", f"start={begun}", *LORA)
    second = run_tiny(tmp_path, "second", f"start={first}", *LORA, "train.steps=1", "optim.lr=1e-12")
    ids = torch.randint(0, 9, (1, 8))
    torch.testing.assert_close(moesaic.load(second).logits(ids), moesaic.load(first).logits(ids))


def test_lora_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.lora changes a model that exists: say start = MODEL"):
        train(tiny(tmp_path, "train.lora.rank=4"))
