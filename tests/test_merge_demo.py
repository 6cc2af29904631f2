"""The whole chain from nothing, a few steps of each stage; and the rows it is made of."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from moesaic.data.instructions import read_examples
from moesaic.data.roles import ROLES, write_roles
from moesaic.lm import load
from moesaic.train import merge_demo
from moesaic.train.merge_chain import Chain


def test_eight_roles_are_written_the_same_every_time(tmp_path: Path) -> None:
    files = write_roles(tmp_path / "a", rows=30)
    assert list(files) == list(ROLES)
    again = write_roles(tmp_path / "b", rows=30)
    for role, file in files.items():
        assert file.read_bytes() == again[role].read_bytes()
        lines = file.read_text().splitlines()
        assert len(set(lines)) == len(lines) == 30
        assert all(example.messages for example in read_examples(file))


def test_the_demo_ends_with_a_verdict_a_table_and_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(root: Path, roles: dict[str, Path], seed: int, **_: object) -> Chain:
        kept = {role: roles[role] for role in ("analyst", "thinker", "writer")}
        few = ["train.batch_size=2", "train.precision=fp32"]
        return Chain(root, kept, seed, True, 2, 2, 2, 2, seq_len=128, vocab_size=300, common=few)

    monkeypatch.setattr(merge_demo, "Chain", small)
    monkeypatch.setattr(merge_demo, "write_roles", lambda folder, seed: write_roles(folder, 20, seed))
    written, said = io.StringIO(), []
    console = Console(file=written, width=200)
    out = merge_demo.run_merge_demo(console, tmp_path, 1, said.append, "moesaic")
    text = written.getvalue()
    for words in (
        "held-out loss",
        "+ shared trained is",
        "of the gap from base to oracle",
        "bits of the role",
    ):
        assert words in text
    assert f"moesaic chat {out} --experts" in text.replace("\n", "")
    assert load(out).config.experts.names == ["analyst", "thinker", "writer"]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    before = len(said)
    merge_demo.run_merge_demo(console, tmp_path, 1, said.append, "moesaic")
    assert not any("steps" in line for line in said[before:])  # nothing is made again
