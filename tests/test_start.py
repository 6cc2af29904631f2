"""Runs that start from a model: an expert from a base, a router from a merge, and what goes along."""

import json
from pathlib import Path

import pytest
import torch
from dense_donors import TEMPLATE, chat_template, dense

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic.cli.training import training_words  # noqa: E402
from moesaic.errors import DataError, RecipeError  # noqa: E402
from moesaic.merge.merge import merge  # noqa: E402
from moesaic.merge.options import merge_options  # noqa: E402
from moesaic.train.loop import run  # noqa: E402
from moesaic.train.recipe import load_recipe  # noqa: E402
from moesaic.train.rundir import read_rows  # noqa: E402
from moesaic.train.session import build_session  # noqa: E402

FEW = ["train.steps=6", "train.batch_size=4", "train.seq_len=48", "train.precision=fp32", "eval.every=6"]


def roles(root: Path) -> dict[str, Path]:
    files = {}
    for name, words in (("mill", "the old mill turns"), ("sums", "1, 2, 3.")):
        rows = [{"instruction": words[: 3 + n % 5], "output": words * (1 + n % 2)} for n in range(12)]
        files[name] = root / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """Two experts trained from one base, and the merge of them."""
    base, files = dense(tmp_path / "base"), roles(tmp_path)
    chat_template(base, TEMPLATE)
    words = []
    for name, file in files.items():
        where = str(tmp_path / f"run-{name}")
        run("expert", [f"start={base}", f"data.path={file}", f"out={where}", *FEW])
        moesaic.export_model(where, tmp_path / name)
        words.append(f"{name}={tmp_path / name}")
    calibration = [f"{name}={file}" for name, file in files.items()]
    options = merge_options(None, str(base), words, calibration, ["router.seq_len=32"])
    merge(options, tmp_path / "moe", lambda _: None)
    return tmp_path / "moe", files


def test_an_expert_differs_from_its_base_in_its_networks_alone(
    merged: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    base, expert = moesaic.load(tmp_path / "base"), moesaic.load(tmp_path / "mill")
    assert (tmp_path / "mill" / "tokenizer_config.json").exists()
    assert expert.stop_ids == base.stop_ids == {1}
    for (name, before), (_, after) in zip(
        base.model.named_parameters(), expert.model.named_parameters(), strict=True
    ):
        learns = ".mlp." in name or "post_attention" in name
        assert torch.equal(before, after) != learns, name


def test_a_router_is_trained_and_nothing_else(merged: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    moe, files = merged
    paths = [f"data.path.{name}={file}" for name, file in files.items()]
    out = run("router", [f"start={moe}", *paths, f"out={tmp_path / 'router'}", *FEW])
    before, after = moesaic.load(moe), moesaic.load(out)
    assert after.config.experts.names == ["mill", "sums"]
    for (name, old), (_, new) in zip(
        before.model.named_parameters(), after.model.named_parameters(), strict=True
    ):
        assert torch.equal(old, new) != name.endswith("mlp.gate.weight"), name
    again = run("shared", [f"start={out}", *paths, f"out={tmp_path / 'shared'}", *FEW])
    moesaic.export_model(again, tmp_path / "final")
    final = moesaic.load(tmp_path / "final")
    assert torch.equal(
        final.model.moe_modules()[0].experts.down_proj, before.model.moe_modules()[0].experts.down_proj
    )
    assert final.config.experts.names == ["mill", "sums"]
    assert json.loads((tmp_path / "final" / "tokenizer_config.json").read_text())["chat_template"] == TEMPLATE
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    ids = final.ids("the old mill")
    torch.testing.assert_close(stock(ids).logits, final.logits(ids), rtol=1e-4, atol=1e-5)


def test_padding_changes_neither_loss_nor_gradient(merged: tuple[Path, dict[str, Path]]) -> None:
    """The language-model loss, the balance loss and their gradients of a batch, padded further or not."""
    from moesaic.train.objectives import Batch, LossOptions, next_token

    lm = moesaic.load(merged[0])
    objective = next_token(LossOptions(balance=0.5, z=0.1))
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(20, (2, 9), generator=generator)
    target_BT = torch.randint(20, (2, 9), generator=generator)
    real_BT = torch.ones(2, 9, dtype=torch.bool)
    real_BT[0, 6:] = False
    target_BT[0, 6:] = -100
    results = []
    for more in (0, 7):
        lm.model.zero_grad()
        pad = torch.nn.functional.pad
        batch = Batch(pad(ids_BT, (0, more)), pad(target_BT, (0, more), value=-100), pad(real_BT, (0, more)))
        loss = objective(lm.model, batch)
        loss.total.backward()
        gradients = [p.grad.clone() for p in lm.model.parameters() if p.grad is not None]
        results.append([loss.total.detach(), loss.parts["balance"], *gradients])
    for near, far in zip(*results, strict=True):
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-6)


def test_a_run_that_starts_from_a_model_resumes(merged: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    moe, files = merged
    words = [f"start={moe}", f"data.path={files['mill']}", *FEW, "checkpoint.every=3"]
    whole = run("router", [*words, f"out={tmp_path / 'whole'}"])
    run("router", [*words, f"out={tmp_path / 'half'}", "train.steps=3"])
    half = run(str(tmp_path / "half"), ["train.steps=6"], resume=True)
    for (_, a), (_, b) in zip(
        moesaic.load(whole).model.named_parameters(), moesaic.load(half).model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01)  # the schedules end elsewhere


def test_what_a_start_cannot_be_is_named(tmp_path: Path) -> None:
    base = dense(tmp_path / "base")
    file = roles(tmp_path)["mill"]
    with pytest.raises(DataError, match=r"mill\.jsonl:1: character '<'"):
        run("expert", [f"start={base}", f"data.path={file}", f"out={tmp_path / 'x'}"])
    chat_template(base, TEMPLATE)
    with pytest.raises(RecipeError, match="no such directory"):
        run("expert", [f"start={tmp_path / 'none'}", f"data.path={file}"])
    with pytest.raises(RecipeError, match="makes another model of it"):
        run("expert", [f"start={base}", f"data.path={file}", "model.layers=4", f"out={tmp_path / 'x'}"])
    untied = dense(tmp_path / "untied", tie_word_embeddings=False)
    chat_template(untied, TEMPLATE)
    with pytest.raises(RecipeError, match="embeddings and head are two"):
        run("expert", [f"start={untied}", f"data.path={file}", "model.tied=true", f"out={tmp_path / 'x'}"])
    with pytest.raises(DataError, match="name the files of instructions"):
        run("expert", [f"start={base}", f"out={tmp_path / 'x'}"])
    (base / "tokenizer.json").unlink()
    with pytest.raises(RecipeError, match=r"has no tokenizer\.json"):
        run("expert", [f"start={base}", f"data.path={file}"])


def test_frozen_experts_stay_in_bfloat16_and_change_no_bit(
    merged: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    moe, files = merged
    moesaic.export_model(moe, tmp_path / "bf16", dtype="bfloat16")
    moesaic.export_model(tmp_path / "bf16", tmp_path / "fp32", dtype="float32")  # the same values, in float32
    losses = []
    for start in ("bf16", "fp32"):
        words = [f"data.path.{name}={file}" for name, file in files.items()]
        words += [
            f"start={tmp_path / start}",
            f"out={tmp_path / ('run-' + start)}",
            *FEW,
            "train.precision=bf16",
        ]
        session = build_session(load_recipe("router", words), lambda _: None)
        for layer in session.model.moe_modules():
            kept = layer.experts.down_proj.dtype
            assert kept == (torch.bfloat16 if start == "bf16" else torch.float32)
            assert layer.gate.weight.dtype == torch.float32
        out = run("router", words)
        losses.append([row["loss"] for row in read_rows(out / "metrics.jsonl")])
    assert losses[0] == losses[1]


def test_the_command_line_names_a_start_and_what_is_frozen() -> None:
    words = training_words(["moe", "optim.lr=1"], ["a=a.jsonl", "b=b.jsonl"], "experts")
    assert words[:2] == ["start=moe", 'data.path={"a" = "a.jsonl", "b" = "b.jsonl"}']
    assert words[2:] == ['train.freeze=["*.mlp.experts.*"]', "train.only=[]", "optim.lr=1"]
    assert training_words(["--optim.lr", "1"], ["a.jsonl"], None) == [
        'data.path="a.jsonl"',
        "--optim.lr",
        "1",
    ]
    for data, freeze, sentence in (
        (["a.jsonl", "b.jsonl"], None, "give one FILE"),
        (["a.jsonl", "b=b.jsonl"], None, "give one FILE"),
        ([], "all", "can be frozen"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            training_words([], data, freeze)


def test_freeze_shared_makes_an_expert_and_nothing_trains_all(tmp_path: Path) -> None:
    base, files = dense(tmp_path / "base"), roles(tmp_path)
    chat_template(base, TEMPLATE)
    for frozen, expected in (("shared", False), ("nothing", True)):
        words = training_words([str(base), f"out={tmp_path / frozen}", *FEW], [str(files["mill"])], frozen)
        session = build_session(load_recipe("expert", words), lambda _: None)
        assert session.model.model.layers[0].self_attn.q_proj.weight.requires_grad == expected
        assert session.model.model.layers[0].mlp.up_proj.weight.requires_grad


def test_names_with_dots_and_files_with_equals_signs(tmp_path: Path) -> None:
    base, files = dense(tmp_path / "base"), roles(tmp_path)
    chat_template(base, TEMPLATE)
    odd = tmp_path / "a=b.jsonl"
    odd.write_bytes(files["mill"].read_bytes())
    more = [str(base), f"out={tmp_path / 'x'}", *FEW]
    for data, domains in (([f"v1.5={files['mill']}"], ["v1.5"]), ([str(odd)], ["a=b"])):
        session = build_session(load_recipe("expert", training_words(more, data, None)), lambda _: None)
        assert session.store.domains == domains


def test_a_run_is_resumed_by_the_words_that_began_it(tmp_path: Path) -> None:
    base, files = dense(tmp_path / "base"), roles(tmp_path)
    chat_template(base, TEMPLATE)
    words = training_words([str(base), f"out={tmp_path / 'run'}", *FEW], [str(files["mill"])], None)
    out = run("expert", words)
    (out / "latest").unlink()
    again = run("expert", words, resume=True)
    assert again == out


def test_random_letters_go_into_any_recipe(merged: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    moe, _ = merged
    cache = f"data.cache={tmp_path / 'cache'}"
    words = [f"start={moe}", "data.source=random", cache, f"out={tmp_path / 'x'}", *FEW]
    told: list[str] = []
    with pytest.raises(DataError, match="among the 26 characters"):  # of a toy that knows few letters
        build_session(load_recipe("router", words), told.append)
    words.append("data.tokenizer=byte")
    with pytest.raises(RecipeError, match="vocab_size"):
        build_session(load_recipe("router", words), told.append)


def test_what_a_run_left_in_bfloat16_is_trained_on_in_it(
    merged: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    moe, files = merged
    moesaic.export_model(moe, tmp_path / "bf16", dtype="bfloat16")
    words = [f"data.path.{name}={file}" for name, file in files.items()] + [*FEW, "train.precision=bf16"]
    out = run("router", [f"start={tmp_path / 'bf16'}", f"out={tmp_path / 'router'}", *words])
    session = build_session(
        load_recipe("shared", [f"start={out}", f"out={tmp_path / 's'}", *words]), lambda _: None
    )
    assert session.model.moe_modules()[0].experts.down_proj.dtype == torch.bfloat16
    assert moesaic.load(out).model.moe_modules()[0].experts.down_proj.dtype == torch.float32
