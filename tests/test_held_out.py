"""Models on files of one's own, against going through the tokens; the command; tasks while a run trains."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from test_harness import SHARED, olmoe, questions
from tiny_runs import rows, run_tiny, tiny

import moesaic
from moesaic import cli
from moesaic.analysis.held_out import OwnData
from moesaic.errors import DataError, RecipeError
from moesaic.lm import LM

TALKS = [
    {"instruction": "what turns?", "output": "the wheel"},
    {"messages": [
        {"role": "user", "content": "who?"}, {"role": "assistant", "content": "a miller"},
        {"role": "user", "content": "where?"}, {"role": "assistant", "content": "by the mill"},
    ]},
]  # fmt: skip


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    pytest.importorskip("transformers")
    return moesaic.load(olmoe(tmp_path_factory.mktemp("model"), 256))


def logprobs(lm: LM, ids: list[int]) -> list[float]:
    logits = lm.logits(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return [float(logits[t, ids[t + 1]]) for t in range(len(ids) - 1)]


def test_loss_of_texts_is_that_of_every_token_in_windows(lm: LM, tmp_path: Path) -> None:
    texts = ["the old mill by the stream " * 3, "a"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = OwnData({"mine": tmp_path / "t.jsonl"}, window=16).run(lm, quiet)["mine"]
    total, count = 0.0, 0
    for text in texts:
        ids = [lm.tokenizer.eos_id, *lm.tokenizer.encode(text).tolist()]
        for start in range(0, len(ids) - 1, 16):
            piece = logprobs(lm, ids[start : start + 17])
            total, count = total - sum(piece), count + len(piece)
    assert found["tokens"] == count
    assert found["samples"] == 2
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    size = sum(len(text.encode()) for text in texts)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-5)
    assert found["loss stderr"] > 0
    assert "exact_match" not in found


def test_of_conversations_the_assistants_words_alone(lm: LM, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(TALKS[1]) + "\n")
    found = OwnData({"talk": tmp_path / "t.jsonl"}).run(lm, quiet)["talk"]
    said = sum(len(lm.tokenizer.encode(text)) for text in ("a miller<|im_end|>\n", "by the mill<|im_end|>\n"))
    assert abs(found["tokens"] - said) <= 3  # how the template's end is cut into tokens
    assert "loss stderr" not in found
    (tmp_path / "empty.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    short = OwnData({"x": tmp_path / "empty.jsonl"}, limit=0)
    with pytest.raises(DataError, match=r"empty\.jsonl: gives nothing to predict"):
        short.run(lm, quiet)


def test_rows_of_any_domain_are_read(lm: LM, tmp_path: Path) -> None:
    lines = [{"text": "the mill", "domain": domain} for domain in ("coder", "writer")] + [{"text": "a"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert OwnData({"mine": tmp_path / "t.jsonl"}).run(lm, quiet)["mine"]["samples"] == 3


def test_answers_are_right_where_they_are_the_words(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    asked: list[str] = []

    def answered(model: LM, prompts: list[list[int]], context: int, most: int) -> list[str]:
        asked.extend(model.tokenizer.decode(prompt) for prompt in prompts)
        assert (context, most) == (256, 9)
        return [" the wheel\n", "no"]

    monkeypatch.setattr("moesaic.analysis.held_out.greedy_answers", answered)
    found = OwnData({"talk": tmp_path / "t.jsonl"}, answers=9).run(lm, quiet)["talk"]
    assert found["exact_match"] == 0.5
    assert found["exact_match stderr"] == pytest.approx(0.5)
    assert "who?" in asked[1]
    assert "where?" in asked[1]
    assert "by the mill" not in asked[1]


def test_the_command_measures_files_beside_each_other(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    (tmp_path / "p.txt").write_text("plain")
    words = ["eval", str(lm.path), str(lm.path), "--data", f"talk={tmp_path / 't.jsonl'}", "--answers", "3"]
    monkeypatch.setattr(sys, "argv", ["moesaic", *words])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for metric in ("loss", "bits_per_byte", "exact_match"):
        assert f"talk: {metric}" in shown
    for bad, hint in (
        (["eval", str(lm.path), "--data", "t.jsonl"], "write NAME=FILE"),
        (["eval", str(lm.path), "--answers", "3", "--local", "mmlu=x"], "--answers is about"),
        (["eval", str(lm.path)], "or --data NAME=FILE"),
        (["eval", str(lm.path), "--data", f"x={tmp_path / 't.jsonl'}", "--answers", "999"], "no room for"),
        (["eval", str(lm.path), "--data", f"x={tmp_path / 't.jsonl'}", "--shots", "2"], "--shots is about"),
        (["eval", str(lm.path), "--data", "mmlu=x", "--local", "mmlu=x"], "a task has that name"),
        (
            ["eval", str(lm.path), "--data", f"x={tmp_path / 'p.txt'}", "--answers", "3"],
            "holds a conversation",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["moesaic", *bad])
        with pytest.raises(SystemExit) as failed:
            cli.main()
        assert failed.value.code == 2
        assert hint in " ".join(capsys.readouterr().err.split())


def test_tasks_are_asked_while_a_run_trains(tmp_path: Path) -> None:
    folder = questions(tmp_path / "q")
    words = [f"eval.local.mmlu={folder}", "eval.limit=2", "eval.every=3", "data.tokenizer=byte"]
    run = run_tiny(tmp_path, "asked", *words)
    asked = rows(run, "val")
    assert [row["step"] for row in asked] == [3, 6]
    answers = rows(run, "tasks")
    assert [row["step"] for row in answers] == [3, 6]
    for row in answers:
        assert 0 <= row["mmlu_mills/acc"] <= 1
        assert 0 <= row["mmlu/acc"] <= 1
    plain = run_tiny(tmp_path, "plain", "eval.every=3", "data.tokenizer=byte")
    assert [row["loss"] for row in rows(plain, "val")] == [row["loss"] for row in asked]
    offline = run_tiny(tmp_path, "offline", "eval.tasks=['arc_easy']", "eval.every=3")
    assert len(rows(offline, "val")) == 2  # it goes on without
    assert rows(offline, "tasks") == []
    with pytest.raises(RecipeError, match="is no task of lm-evaluation-harness"):
        moesaic.train.loop.train(tiny(tmp_path, "eval.tasks=['no_such_task']", f"out={tmp_path / 'bad'}"))
    assert not (tmp_path / "bad" / "recipe.toml").exists()


def test_real_questions_can_be_asked(tmp_path: Path) -> None:
    if not SHARED.exists():
        pytest.skip("../shared/data/eval is not here")
    words = [f"eval.local.gsm8k={next(SHARED.glob('gsm8k*.jsonl'))}", "eval.limit=1", "data.tokenizer=byte"]
    run = run_tiny(tmp_path, "real", *words, "model.context=32")
    assert rows(run, "tasks")[-1]["gsm8k/exact_match (strict-match)"] == 0
