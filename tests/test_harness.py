"""Evaluation: scores against going through the tokens, and against lm-evaluation-harness's own hf model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_donors import TEXT, dense

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

import moesaic  # noqa: E402
from moesaic import cli  # noqa: E402
from moesaic.analysis.harness import Suite, harness_model, rows_of  # noqa: E402
from moesaic.analysis.scoring import score  # noqa: E402
from moesaic.analysis.tasks import local_tasks  # noqa: E402
from moesaic.data.tokenizers import Tokenizer  # noqa: E402
from moesaic.errors import DataError, RecipeError  # noqa: E402
from moesaic.weights.hf import tokenizer_files  # noqa: E402

SHARED = Path(__file__).parents[2] / "shared" / "data" / "eval"


def quiet(_: str) -> None:
    pass


def olmoe(directory: Path, context: int = 256) -> Path:
    """A small OLMoE as transformers saves it, that can read any bytes."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.bpe([TEXT * 3, "Question: Answer: ABCD 0123456789 #### 7"], 300)
    config = transformers.OlmoeConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_experts=8, num_experts_per_tok=2, max_position_embeddings=context,
        **dict.fromkeys(("pad_token_id", "bos_token_id")), eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    for name, content in tokenizer_files(tokenizer).items():
        (directory / name).write_bytes(content)
    return directory


def by_going_through(lm: Any, before: list[int], after: list[int], context: int) -> tuple[float, bool]:
    whole = (before + after)[-(context + 1) :]
    logits = lm.logits(torch.tensor([whole[:-1]]))[0].double().log_softmax(-1)
    kept = min(len(after), len(whole) - 1)
    total, greedy = 0.0, True
    for place in range(len(whole) - 1 - kept, len(whole) - 1):
        total += float(logits[place, whole[place + 1]])
        greedy &= int(logits[place].argmax()) == whole[place + 1]
    return total, greedy


@pytest.mark.parametrize("kind", ["llama", "olmo2", "learned", "conv"])
def test_scores_are_those_of_each_text_by_itself(kind: str, tmp_path: Path) -> None:
    if kind == "learned":
        from tiny_runs import run_tiny

        lm = moesaic.load(run_tiny(tmp_path, "run", "train.steps=1", "model.position=learned"))
    elif kind == "conv":
        from tiny_runs import run_tiny

        lm = moesaic.load(run_tiny(tmp_path, "run", "train.steps=9", "model.conv=3", "optim.lr=0.1"))
    else:
        lm = moesaic.load(dense(tmp_path / "base", kind))
    draw = torch.Generator().manual_seed(1)

    def some(length: int) -> list[int]:
        return torch.randint(lm.config.vocabulary, (length,), generator=draw).tolist()

    shared = [some(n) for n in (3, 9, 9, 1, 12)]
    pairs = [(shared[n % 5], some(1 + n % 4)) for n in range(30)]
    pairs += [(some(20), some(5)), (some(2), some(30))]  # longer than the model reads
    pairs += [(shared[0], some(3)) for _ in range(300)] + [(shared[2], [])]  # very many, and nothing at all
    greedy = lm.logits(torch.tensor([shared[1]]))[0, -1].argmax()
    pairs.append((shared[1], [int(greedy)]))
    told: list[int] = []
    found = score(lm.model, pairs, 16, told.append)
    assert sum(told) == len(pairs) - 1
    assert found[-1].greedy
    for (before, after), one in zip(pairs, found, strict=True):
        expected, whether = by_going_through(lm, before, after, 16)
        assert one.logprob == pytest.approx(expected, abs=1e-4)
        assert one.greedy == whether


def test_the_harness_gets_what_its_own_hf_model_gives(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    directory = olmoe(tmp_path / "olmoe")
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=3, max_length=64)
    ours = harness_model(moesaic.load(directory), quiet)
    type(ours).max_length = property(lambda _: 64)
    asked = ["the old mill by", "turns and turns; a", " miller ", "", "1, 2, " * 20]
    answers = [" the", " stream turns", " sacks: 1", "\nthe old mill " * 9]
    requests = [SimpleNamespace(args=(a, b)) for a in asked for b in answers]
    for one, other in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] == other[1]
    texts = [SimpleNamespace(args=(TEXT * n,)) for n in (1, 4)]
    for one, other in zip(
        ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
    options = {"until": [";"], "max_gen_toks": 12, "do_sample": False}
    prompts = [SimpleNamespace(args=(a, options)) for a in asked if a]
    assert ours.generate_until(prompts) == theirs.generate_until(prompts)


def test_a_short_context_keeps_the_end_of_a_prompt(tmp_path: Path) -> None:
    lm = moesaic.load(olmoe(tmp_path / "olmoe", 64))
    request = SimpleNamespace(args=(TEXT * 3, {"until": [], "max_gen_toks": 256}))
    ids = lm.tokenizer.encode(TEXT * 3)[-32:].tolist()
    assert harness_model(lm, quiet).generate_until([request]) == [lm.generate(ids, 32)]


def questions(folder: Path) -> Path:
    folder.mkdir()
    subjects = ("mills", "rivers")
    for name, count in (("dev", 5), ("val", 12)):
        rows = [
            {
                "subject": s,
                "question": f"{s} {n}?",
                "choices": [f"{n}", "old", "x", TEXT[:n]],
                "answer": n % 4,
            }
            for s in subjects
            for n in range(count)
        ]
        (folder / f"mmlu_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(9)]
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_local_tasks_score_as_with_the_hf_model(tmp_path: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    directory, folder = olmoe(tmp_path / "olmoe", 2048), questions(tmp_path / "q")
    local = {"mmlu": folder, "gsm8k": folder / "gsm8k.jsonl"}
    suite = Suite([], local)
    suite.check()
    ours = suite.run(moesaic.load(directory), quiet)
    theirs = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=4)
    configs = [config for name, path in local.items() for config in local_tasks(name, path, None)]
    found = lm_eval.simple_evaluate(model=theirs, tasks=configs, bootstrap_iters=0)["results"]
    for subject in ("mmlu_mills", "mmlu_rivers"):
        assert ours[subject]["acc"] == found[subject]["acc,none"]
        assert ours[subject]["samples"] == 12
    expected = (found["mmlu_mills"]["acc,none"] + found["mmlu_rivers"]["acc,none"]) / 2
    assert ours["mmlu"]["acc"] == pytest.approx(expected)
    for kind in ("strict-match", "flexible-extract"):
        assert ours["gsm8k"][f"exact_match ({kind})"] == found["gsm8k"][f"exact_match,{kind}"]
    labels = [label for label, _ in rows_of({"a": ours, "b": ours})]
    assert "mmlu: acc" in labels


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data is not here")
def test_real_questions_are_read(tmp_path: Path) -> None:
    assert len(local_tasks("mmlu", SHARED, 1)) == 57
    (task,) = local_tasks("gsm8k", SHARED / "gsm8k_test_part.jsonl", 3)
    data = task["custom_dataset"]()
    assert (len(data["train"]), len(data["test"])) == (5, 3)


def test_the_command_compares_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, folder = olmoe(tmp_path / "olmoe", 1024), questions(tmp_path / "q")
    words = ["moesaic", "eval", str(directory), f"--local=mmlu={folder}", "--limit=2", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told[str(directory)]["mmlu"]["samples"] == 4
    monkeypatch.setattr(sys, "argv", ["moesaic", "eval", str(directory)])
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert refused.value.code == 2


def test_what_cannot_be_asked_is_named(tmp_path: Path) -> None:
    folder = questions(tmp_path / "q")
    with pytest.raises(RecipeError, match="is no task of lm-evaluation-harness"):
        Suite(["no_such_task_at_all"]).check()
    with pytest.raises(RecipeError, match=r"--shots 9: .*mmlu_dev\.jsonl has 5"):
        local_tasks("mmlu", folder, None, 9)
    with pytest.raises(RecipeError, match="can be read from files"):
        local_tasks("arc", folder, None)
    (folder / "mmlu_dev.jsonl").write_text(
        json.dumps({"subject": "mills", "question": "a", "choices": list("abcd"), "answer": 0}) + "\n"
    )
    with pytest.raises(DataError, match="has no example of rivers"):
        local_tasks("mmlu", folder, None)
    for row, sentence in (
        ({"subject": "a", "question": "b", "choices": ["c"], "answer": 0}, "choices are four texts"),
        ({"subject": "a", "question": "b"}, "has no field 'choices'"),
        ({"subject": "a", "question": 5, "choices": list("abcd"), "answer": 0}, "not a text"),
    ):
        (folder / "mmlu_dev.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=sentence):
            local_tasks("mmlu", folder, None)
    (folder / "gsm8k.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    with pytest.raises(DataError, match="5 are shown as examples"):
        local_tasks("gsm8k", folder / "gsm8k.jsonl", None)
