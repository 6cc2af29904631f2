"""The open pipeline from nothing, a few steps of each stage; and the lessons it is made of."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.data.corpora import DataOptions
from moesaic.data.lessons import write_pairs, write_questions
from moesaic.data.pretrain import prepare
from moesaic.data.roles import write_roles
from moesaic.data.tokenizers import Tokenizer
from moesaic.lm import load
from moesaic.train.pipeline_demo import Lengths, run_pipeline_demo


def test_pairs_and_questions_are_made_of_the_rows(tmp_path: Path) -> None:
    roles = write_roles(tmp_path / "roles", rows=40)
    rows = {r["output"] for file in roles.values() for r in map(json.loads, file.read_text().splitlines())}
    pairs = [
        json.loads(line) for line in write_pairs(roles, tmp_path / "p.jsonl", 5, 1).read_text().splitlines()
    ]
    assert len(pairs) == 40
    assert all(
        pair["rejected"] in rows and pair["chosen"].startswith(pair["rejected"] + "\n") for pair in pairs
    )
    folder = write_questions(roles, tmp_path / "q", 3, 1)
    options = DataOptions(source="instructions", path={k: str(f) for k, f in roles.items()}, tokenizer="byte")
    store = prepare(options, seq_len=4096)
    train = {Tokenizer.byte().decode(ids.tolist()) for shard in store.shards for ids, _ in shard.train}
    for name in ("dev", "val"):
        asked = [json.loads(line) for line in (folder / f"mmlu_{name}.jsonl").read_text().splitlines()]
        assert asked
        for one in asked:  # what is asked is never trained on
            words = [text for text in train if f"{one['question']}<|im_end|>" in text]
            assert any(one["choices"][one["answer"]] in text for text in words) == (name == "dev")
        for one in asked:
            assert len(set(one["choices"])) == 4
            assert set(one["choices"]) <= rows
    again = write_questions(roles, tmp_path / "r", 3, 1)
    assert (again / "mmlu_val.jsonl").read_bytes() == (folder / "mmlu_val.jsonl").read_bytes()


def test_the_demo_goes_through_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "moesaic.train.pipeline_demo.write_roles", lambda folder, seed: write_roles(folder, 30, seed)
    )
    shrunk = ["model.layers=2", "model.width=32", "model.experts.hidden=16", "data.max_chars=60000"]
    monkeypatch.setattr("moesaic.train.pipeline_demo._SHAPE", shrunk)
    written, said = io.StringIO(), []
    few = Lengths(pretrain=3, anneal=2, sft=2, dpo=2, questions=2)
    final = run_pipeline_demo(
        Console(file=written, width=160), tmp_path / "x", 1, said.append, "moesaic", few
    )
    text = written.getvalue()
    for words in (
        "bits per byte",
        "pretrained",
        "annealed",
        "fine-tuned",
        "preferred",
        "saturation of step 1",
    ):
        assert words in text
    assert load(final).config.experts.count == 64
    assert (tmp_path / "x" / "analysis" / "saturation.png").exists()
    assert json.loads((final / "config.json").read_text())["architectures"] == ["OlmoeForCausalLM"]
    before = len(said)
    run_pipeline_demo(Console(file=io.StringIO()), tmp_path / "x", 1, said.append, "moesaic", few)
    assert not any("steps of" in line for line in said[before:])  # nothing is made again
