"""A merge against its rivals, from the command line: what is compared, what is said, what the card keeps."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from dense_donors import TEMPLATE, change, chat_template, dense

transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic import cli  # noqa: E402
from moesaic.errors import RecipeError  # noqa: E402
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
    others, missing = rivals(parts, 2, 2, quiet)
    dense_ones, no_dense = dense_rivals(parts, 2, 2, quiet)
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
    others, left_out = rivals(bare, 2, 0, quiet)
    assert HIDDEN in others  # its prompts are the first questions of the data
    assert SMOL not in others
    assert [sentence.partition(" (")[0] for sentence in left_out] == [SMOL]
    assert dense_rivals(bare, 2, 0, quiet)[0] == {}
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


def test_a_card_keeps_what_people_wrote(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n\nWords.\n")
    write_measured(tmp_path, "first")
    text = (tmp_path / "README.md").read_text() + "\nMore words.\n"
    (tmp_path / "README.md").write_text(text)
    write_measured(tmp_path, "second")
    assert re.sub(r"\n+", "\n", (tmp_path / "README.md").read_text()) == (
        "# Mine\nWords.\n<!-- measured: begin -->\n## Measured\nsecond\n<!-- measured: end -->\nMore words.\n"
    )
