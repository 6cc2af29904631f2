"""A merge against its rivals, from the command line: what is compared, what is said, what the card keeps."""

import io
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_donors import TEMPLATE, change, chat_template, dense
from rich.console import Console

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic import cli  # noqa: E402
from moesaic.errors import CheckpointError, RecipeError  # noqa: E402
from moesaic.merge.merge import merge  # noqa: E402
from moesaic.merge.options import MergeOptions, recorded_options  # noqa: E402
from moesaic.train.merge_parts import Parts  # noqa: E402
from moesaic.train.merge_proof import DENSE, HIDDEN, ORACLE, SMOL, WIDE, dense_rivals, prove, rivals, widened  # noqa: E402
from moesaic.weights.card import write_measured  # noqa: E402

FEW = ["train.batch_size=2", "train.precision=fp32", "optim.lr=1e-3"]
IDS = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(0))


def quiet(_: str) -> None:
    pass


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    base = dense(tmp_path / "base")
    chat_template(base, TEMPLATE)
    experts, files = {}, {}
    for seed, (name, text) in enumerate({"mill": "the old mill turns", "sums": "1, 2, 3."}.items(), 1):
        experts[name] = change(base, tmp_path / name, seed, ".mlp.")
        rows = [
            {"instruction": text[: 3 + n % 5], "output": text * (1 + n % 2) + str(1 + n % 3)}
            for n in range(40)
        ]
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"mill": ["the mill"], "sums": ["1, 2"]}
    return Parts(tmp_path / "work", base, experts, files, prompts, seed=3, seq_len=48, common=FEW)


def test_every_rival_is_made_and_measured(parts: Parts) -> None:
    others, missing = rivals(parts, 2, 1e-3, quiet)
    dense_ones, no_dense = dense_rivals(parts, 2, 2, 1e-3, quiet)
    others, left_out = {**others, **dense_ones}, [*missing, *no_dense]
    assert list(others)[:3] == ["base", "mill", "sums"]
    assert {HIDDEN, SMOL, DENSE, WIDE} < others.keys()
    assert left_out == []
    ours = {"untrained": parts.merged("ridge", quiet, router={"init": "ridge", "seq_len": 32})}
    proof = prove(parts, others, ours, left_out, quiet)
    losses = proof.documents.losses
    for c, role in enumerate(parts.roles):  # the oracle reads each text as its own expert does
        members = proof.documents.documents.domain_N == c
        assert (losses[ORACLE][0][members] == losses[role][0][members]).all()
    assert set(proof.as_json()["models"]) == {*others, "untrained", ORACLE}
    table = proof.markdown()
    for name in (*others, "**untrained**", ORACLE):
        assert f"| {name} |" in table
    smol = moesaic.load(parts.root / "smolmoe")
    first = moesaic.load(parts.experts["mill"])
    merged = smol.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(merged[name], tensor), name


def test_a_widened_base_is_the_base_until_it_is_trained(parts: Parts) -> None:
    wide, base = moesaic.load(widened(parts, 2, quiet)), moesaic.load(parts.base)
    torch.testing.assert_close(wide.logits(IDS), base.logits(IDS), rtol=1e-5, atol=1e-6)
    counts = wide.config.parameters()
    merge_counts = moesaic.load(parts.merged("two", quiet, router={"init": "zero"})).config.parameters()
    router = 3 * 2 * 24
    assert counts.active == merge_counts.active - router
    ffn = wide.model.model.layers[0].mlp
    assert float(ffn.up_proj.weight.detach()[-40:].abs().min()) > 0  # so that a gradient reaches what is new
    stock = transformers.AutoModelForCausalLM.from_pretrained(wide.path)
    assert stock.config.intermediate_size == 80


def test_what_was_not_trained_is_said_to_be_missing(parts: Parts) -> None:
    bare = Parts(parts.root, parts.base, parts.experts, parts.roles, {}, 3, 48, FEW)
    others, left_out = rivals(bare, 0, None, quiet)
    assert HIDDEN in others  # its prompts are the first questions of the data
    assert SMOL not in others
    assert [sentence.partition(" (")[0] for sentence in left_out] == [SMOL]
    assert dense_rivals(bare, 2, 0, None, quiet)[0] == {}
    foreign = Parts(
        parts.root, parts.base, parts.experts, {**parts.roles, "odd": parts.roles["mill"]}, {}, 3, 48
    )
    with pytest.raises(RecipeError, match="data of odd: no expert has that name"):
        prove(foreign, others, {"x": parts.base}, [], quiet)


def test_the_command_finds_the_parts_and_writes_the_card(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {
        name: {"model": str(path), "calibration": str(parts.roles[name])}
        for name, path in parts.experts.items()
    }
    options = MergeOptions.model_validate({"base": str(parts.base), "experts": experts})
    merge(options, tmp_path / "moe", quiet)
    assert recorded_options(tmp_path / "moe") == options
    words = [f"--data={name}={file}" for name, file in parts.roles.items()]
    monkeypatch.setattr(sys, "argv", ["moesaic", "eval", "merge", str(tmp_path / "moe"), *words, "--json"])
    for _ in range(2):
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert not done.value.code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ours"] == "the merge"
    assert told["models"]["random router"]["loss"] > 0
    card = (tmp_path / "moe" / "README.md").read_text()
    assert card.count("## Measured") == 1
    assert f"| **the merge** | {told['models']['the merge']['loss']:.3f} |" in card
    assert all(sentence in card for sentence in told["verdict"])
    moesaic.load(tmp_path / "moe")  # whose manifest does not mind
    monkeypatch.setattr(sys, "argv", ["moesaic", "eval", "merge", str(parts.base), *words])
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert refused.value.code == 2
    assert "does not say what it was merged of" in capsys.readouterr().err


def test_adapters_and_longer_vocabularies_are_compared_too(parts: Parts, tmp_path: Path) -> None:
    from test_merge import adapter

    adapter(
        tmp_path / "lora", parts.base, {"model.layers.0.mlp.up_proj": 2, "model.layers.1.self_attn.q_proj": 2}
    )
    mixed = Parts(
        tmp_path / "w", parts.base, {**parts.experts, "lora": tmp_path / "lora"}, parts.roles, {}, 3, 48
    )
    others, left_out = rivals(mixed, 0, None, quiet)
    assert HIDDEN in left_out[0]  # the adapter has neither prompts nor data
    whole, base = moesaic.load(others["lora"]), moesaic.load(parts.base)
    differ = {
        name
        for (name, mine), its in zip(whole.model.named_parameters(), base.model.parameters(), strict=True)
        if not torch.equal(mine, its)
    }
    assert differ == {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"}
    soup = moesaic.load(others["average (soup)"])
    state = [moesaic.load(others[name]).model.state_dict() for name in mixed.experts]
    for name, tensor in soup.model.state_dict().items():
        torch.testing.assert_close(tensor, sum(s[name] for s in state) / 3)


def test_what_was_made_of_other_parts_is_made_again(parts: Parts) -> None:
    made = parts.merged("random", quiet, router={"init": "random"})
    before = (made / "model.safetensors").read_bytes()
    assert parts.merged("random", quiet, router={"init": "random"}) == made
    said: list[str] = []
    other = replace(parts, seed=4)
    other.merged("random", said.append, router={"init": "random"})
    assert said
    assert (made / "model.safetensors").read_bytes() != before
    run = parts.root / "runs" / "dense"
    run.mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"runs/dense: is in the way; it was not made here"):
        parts.stage("dense", "expert", parts.base, 2, quiet)
    assert run.is_dir()
    (parts.root / "mine").mkdir()
    with pytest.raises(RecipeError, match="was not made here"):
        parts.merged("mine", quiet)


def test_a_stage_that_was_broken_off_goes_on(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = parts.stage("dense", "expert", parts.base, 4, quiet, "train.only=[]")
    expected = (whole / "model.safetensors").read_bytes()
    again = replace(parts, root=parts.root.parent / "again")

    def fail(*_: object) -> str:
        raise OSError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.train.merge_parts.export_model", fail)
        with pytest.raises(OSError, match="broken off"):
            again.stage("dense", "expert", parts.base, 4, quiet, "train.only=[]")
    assert (
        again.stage("dense", "expert", parts.base, 4, quiet, "train.only=[]") / "model.safetensors"
    ).exists()
    assert (again.root / "dense" / "model.safetensors").read_bytes() == expected


def test_names_that_a_table_or_a_key_would_trip_over(parts: Parts, tmp_path: Path) -> None:
    renamed = dict(zip(("v1.5[/b]", "x|y"), parts.experts.values(), strict=True))
    files = dict(zip(renamed, parts.roles.values(), strict=True))
    odd = replace(parts, experts=renamed, roles=files, prompts={})
    others, missing = rivals(odd, 0, None, quiet)
    proof = prove(odd, others, {"ours": odd.merged("zero", quiet, router={"init": "zero"})}, missing, quiet)
    assert "| x/y |" in proof.markdown()
    text = io.StringIO()
    Console(file=text, width=200).print(*proof.tables(200))
    assert "v1.5[/b]" in text.getvalue()
    for names in (("base", "b"), ("a", "random router")):
        with pytest.raises(RecipeError, match="names a row of the comparison"):
            rivals(
                replace(parts, experts=dict(zip(names, parts.experts.values(), strict=True))), 0, None, quiet
            )
    with pytest.raises(RecipeError, match="names two models"):
        prove(parts, others, {"base": parts.base}, [], quiet)


def test_one_role_alone_is_measured_too(parts: Parts) -> None:
    one = replace(parts, roles={"mill": parts.roles["mill"]})
    others, missing = rivals(one, 0, None, quiet)
    proof = prove(one, others, {"ours": one.merged("zero", quiet, router={"init": "zero"})}, missing, quiet)
    assert proof.changing is None
    assert not any("change role" in sentence for sentence in proof.sentences())


def test_a_card_keeps_what_people_wrote(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nWords.\n")
    write_measured(tmp_path, "first")
    text = (tmp_path / "README.md").read_text() + "\nMore words.\n"
    (tmp_path / "README.md").write_text(text)
    write_measured(tmp_path, "second")
    half = tmp_path / "half"
    half.mkdir()
    (half / "README.md").write_text(text.replace("<!-- measured: end -->", ""))
    with pytest.raises(CheckpointError, match="no '<!-- measured: end -->' after it"):
        write_measured(half, "third")
    assert re.sub(r"\n+", "\n", (tmp_path / "README.md").read_text()) == (
        "# Mine\nWords.\n<!-- measured: begin -->\n## Measured\nsecond\n<!-- measured: end -->\nMore words.\n"
    )


def test_a_strangers_recipe_of_a_merge_is_believed_in_nothing(tmp_path: Path) -> None:
    (tmp_path / "merge.toml").write_text("base = " + "[" * 100_000)
    with pytest.raises(RecipeError, match="brackets inside brackets"):
        recorded_options(tmp_path)
    (tmp_path / "merge.toml").unlink()
    os.mkfifo(tmp_path / "merge.toml")
    with pytest.raises(CheckpointError, match="not a regular file"):
        recorded_options(tmp_path)
