"""Preferences: pairs as data, the losses against trl's and against themselves, and a run that learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_donors import TEMPLATE, chat_template, dense
from tiny_runs import quiet_rows
from torch import Tensor

import moesaic
from moesaic.data.corpora import DataOptions
from moesaic.data.preferences import PreferenceStore
from moesaic.data.pretrain import prepare
from moesaic.errors import DataError, RecipeError
from moesaic.losses import preference_losses
from moesaic.train.loop import run
from moesaic.train.objectives import Batch, LossOptions, answer_logprobs, next_token, preference
from moesaic.train.recipe import load_recipe
from moesaic.train.session import build_session

ASKED = ["the old", "a mill", "turns", "1, 2", "sacks", "by the"]
FEW = ["train.precision=fp32", "train.batch_size=4", "train.accumulate=2", "train.seq_len=48"]


def pair(n: int) -> dict[str, str]:
    asked = ASKED[n % 6][: 2 + n % 4]
    return {"prompt": asked, "chosen": "the mill turns"[: 5 + n % 9], "rejected": "1, 2, 3"[: 3 + n % 4]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    directory = dense(tmp_path / "base")
    chat_template(directory, TEMPLATE)
    return directory


def store_of(base: Path, file: Path, seq_len: int = 48) -> PreferenceStore:
    options = DataOptions(
        source="preferences", path={"pairs": str(file)}, tokenizer=str(base / "tokenizer.json")
    )
    store = prepare(options, seq_len=seq_len)
    assert isinstance(store, PreferenceStore)
    return store


def test_every_form_of_a_pair_is_the_same_pair(base: Path, tmp_path: Path) -> None:
    asked, good, bad = (
        {"role": "user", "content": "the old"},
        {"role": "assistant", "content": "mill"},
        {"role": "assistant", "content": "1, 2"},
    )
    other = pair(3)
    forms = (
        {"prompt": "the old", "chosen": "mill", "rejected": "1, 2"},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": "the old", "chosen": [asked, good], "rejected": [asked, bad]},
    )
    seen = set()
    for n, form in enumerate(forms):
        store = store_of(base, write(tmp_path / f"{n}.jsonl", form, other))
        both = store.pairs["train"] + store.pairs["val"]
        seen.add(frozenset(one[0].tobytes() + two[0].tobytes() for one, two in both))
    assert len(seen) == 1
    tokenizer = moesaic.load(base).tokenizer
    texts = {tokenizer.decode(ids[learnt]) for one in both for ids, learnt in one}
    assert {"mill\n", "1, 2\n"} < texts  # of a conversation the last answer, and nothing else, is learnt


def test_only_the_last_answer_of_a_conversation_is_learnt(base: Path, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "old"},
        {"role": "user", "content": "mill"},
    ]
    ends = ({"role": "assistant", "content": "turns"}, {"role": "assistant", "content": "counts"})
    row = {"prompt": talk, "chosen": [ends[0]], "rejected": [ends[1]]}
    store = store_of(base, write(tmp_path / "x.jsonl", row, pair(1)))
    tokenizer = moesaic.load(base).tokenizer
    texts = {tokenizer.decode(i[m]) for one in store.pairs["train"] + store.pairs["val"] for i, m in one}
    assert {"turns\n", "counts\n"} < texts
    assert not any("old" in text for text in texts)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {
                "chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "b"}],
            },
            "answer different prompts",
        ),
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is neither"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "an answer is empty"),
        ({"prompt": "a", "chosen": [{"role": "x", "content": "b"}], "rejected": "b"}, "needs role"),
        ({"chosen": "a", "rejected": "b"}, "after a turn of the user"),
        ({"prompt": "a", "chosen": "\ud800", "rejected": "b"}, "lone surrogate"),
    ],
)
def test_rows_that_are_no_pairs_are_named(base: Path, tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=rf"x\.jsonl:1: .*{sentence}"):
        store_of(base, write(tmp_path / "x.jsonl", row))


def test_pairs_that_say_nothing_are_counted(base: Path, tmp_path: Path) -> None:
    same = {"prompt": "the", "chosen": "mill", "rejected": "mill"}
    long = {"prompt": "the old mill by the stream " * 3, "chosen": "a", "rejected": "1"}
    store = store_of(base, write(tmp_path / "x.jsonl", same, long, *map(pair, range(6))))
    assert store.notes == [
        "1 pairs have two equal answers; left out",
        "1 pairs lose an answer in 48 tokens; left out",
    ]
    assert len(store.pairs["train"]) + len(store.pairs["val"]) == 6
    with pytest.raises(
        DataError, match=r"0 pair\(s\) left in train\.seq_len = 48.*1 of equal answers, 1 cut away"
    ):
        store_of(base, write(tmp_path / "y.jsonl", same, long))


def ratios(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(5, generator=draw) * 3, torch.randn(5, generator=draw) * 3


def test_losses_by_hand() -> None:
    chosen, rejected = ratios()
    difference = chosen - rejected
    dpo = preference_losses("dpo", chosen, rejected, 0.3)
    torch.testing.assert_close(dpo, (1 + (-0.3 * difference).exp()).log())
    assert torch.equal(preference_losses("dpo_norm", chosen, rejected, 0.3), dpo)
    smooth = preference_losses("dpo", chosen, rejected, 0.3, 0.2)
    torch.testing.assert_close(smooth, 0.8 * dpo + 0.2 * (1 + (0.3 * difference).exp()).log())
    torch.testing.assert_close(preference_losses("ipo", chosen, rejected, 0.25), (difference - 2).square())
    kto = preference_losses("kto", chosen, rejected, 0.3)
    up, down = max(0.0, float(chosen.mean())), max(0.0, float(rejected.mean()))
    expected = [1 - torch.sigmoid(0.3 * (chosen - down)), 1 - torch.sigmoid(0.3 * (up - rejected))]
    torch.testing.assert_close(kto, torch.cat(expected))
    zero = torch.zeros(2)
    assert preference_losses("dpo", zero, zero, 0.1).tolist() == pytest.approx([0.6931472] * 2)


def batch_of(store: PreferenceStore, model: Any) -> Batch:
    windows = store.batch(1, 1, 6, 48)
    reference = torch.randn(12, generator=torch.Generator().manual_seed(4)) * 5 - 20
    return Batch(*windows._replace(reference_B=reference))


TRL = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "ipo": "ipo"}  # its names for the same losses


@pytest.mark.parametrize("kind", TRL)
def test_loss_and_gradients_are_those_of_trl(base: Path, tmp_path: Path, kind: Any) -> None:
    trl = pytest.importorskip("trl")
    store = store_of(base, write(tmp_path / "x.jsonl", *map(pair, range(20))))
    model = moesaic.load(base).model.train()
    batch = batch_of(store, model)
    loss = preference(LossOptions(objective=kind, beta=0.2))(model, batch)
    model.zero_grad()
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    theirs, grads = trl_loss(trl, base, batch, TRL[kind])
    assert float(loss.total.detach()) == pytest.approx(theirs, abs=1e-5)
    assert ours.keys() <= grads.keys()
    for name, grad in ours.items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-4, atol=1e-5, msg=name)


def trl_loss(trl: Any, base: Path, batch: Batch, kind: str) -> tuple[float, dict[str, Tensor]]:
    """The loss of trl's own trainer on the same tokens with the same reference."""
    import datasets
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    options = trl.DPOConfig(
        output_dir=str(base.parent / "trl"), beta=0.2, loss_type=[kind],
        report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        precompute_ref_log_probs=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(model=model, args=options, train_dataset=rows, processing_class=words)
    assert batch.real_BT is not None
    assert batch.reference_B is not None
    learnt_BT = batch.target_BT != -100
    ids = torch.cat([batch.ids_BT, torch.zeros(len(batch.ids_BT), 1, dtype=torch.int64)], 1)
    ids[:, 1:][learnt_BT] = batch.target_BT[learnt_BT]
    real = torch.cat([batch.real_BT, torch.zeros(len(ids), 1, dtype=torch.bool)], 1)
    real[:, 1:] |= learnt_BT
    mask = torch.cat([torch.zeros(len(ids), 1, dtype=torch.bool), learnt_BT], 1)
    order = [*range(0, len(ids), 2), *range(1, len(ids), 2)]  # trl: all chosen, then all rejected
    inputs = {
        "input_ids": ids[order],
        "attention_mask": real[order].long(),
        "completion_mask": mask[order].long(),
        "ref_chosen_logps": batch.reference_B[0::2],
        "ref_rejected_logps": batch.reference_B[1::2],
    }
    model.train()
    model.zero_grad()
    trainer.precompute_ref_logps = True
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_a_run_prefers_what_was_chosen_and_resumes(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", *map(pair, range(60)))
    words = [f"start={base}", f"data.path.pairs={file}", f"data.cache={tmp_path / 'cache'}", *FEW]
    words += ["train.steps=20", "eval.every=10", "checkpoint.every=10", "optim.lr=2e-3", "schedule.warmup=1"]
    out = run("dpo", [*words, f"out={tmp_path / 'run'}"])
    rows = quiet_rows(out)
    first = next(row for row in rows if row["split"] == "train")
    held_out = [row for row in rows if row["split"] == "val"]
    assert first["step"] == 10
    assert held_out[-1]["pairs_accuracy"] > 0.9
    assert held_out[-1]["pairs_margin"] > held_out[0]["pairs_margin"] > 0
    assert held_out[-1]["pairs_main"] < 0.6931
    cached = list((tmp_path / "cache" / "references").iterdir())
    assert len(cached) == 1
    before = cached[0].stat().st_mtime_ns
    import shutil

    half = tmp_path / "half"
    shutil.copytree(out, half)
    for gone in (half / "checkpoints" / "step-00000020", half / "model"):
        shutil.rmtree(gone)
    again = run(str(half), resume=True)
    assert cached[0].stat().st_mtime_ns == before
    ours, theirs = moesaic.load(out).model.state_dict(), moesaic.load(again).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_reference_is_the_model_that_the_run_begins_as(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", *map(pair, range(30)))
    words = [f"start={base}", f"data.path.pairs={file}", f"data.cache={tmp_path / 'cache'}", *FEW]
    session = build_session(load_recipe("dpo", [*words, f"out={tmp_path / 'run'}"]), lambda _: None)
    assert isinstance(session.store, PreferenceStore)
    lm = moesaic.load(base)
    for number, one in enumerate(session.store.pairs["val"]):
        for side in (0, 1):
            ids, learnt = one[side]
            logits = lm.logits(torch.tensor(ids[None, :-1]).long())[0].log_softmax(-1)
            picked = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:]).long()]
            expected = float(picked[torch.tensor(learnt[1:])].sum())
            assert session.store.reference["val"][number, side] == pytest.approx(expected, abs=1e-4)
    (batch,) = Batch(*session.store.batch(1, 1, 4, 48)).split(1)
    with torch.no_grad():
        parts = session.objective(session.model, batch).parts
        logp_B, _, _ = answer_logprobs(session.model, batch)
    assert float(parts["main"]) == pytest.approx(0.693147, abs=1e-5)
    assert float(parts["chosen_logp"]) == pytest.approx(float(logp_B[0::2].mean()))
    assert float(parts["kl"]) == pytest.approx(0.0, abs=1e-5)


def test_another_model_of_the_same_weights_has_another_reference(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", *map(pair, range(10)))
    words = [f"start={base}", f"data.path.pairs={file}", f"data.cache={tmp_path / 'cache'}", *FEW]
    prints = set()
    for theta in (10000.0, 500.0):
        more = [f"model.attention.rope_theta={theta}", f"out={tmp_path / str(theta)}"]
        prints.add(build_session(load_recipe("dpo", [*words, *more]), lambda _: None).store.fingerprint)
    assert len(prints) == len(list((tmp_path / "cache" / "references").iterdir())) == 2


def test_all_pairs_of_a_prompt_are_on_one_side(base: Path, tmp_path: Path) -> None:
    rows = [{**pair(n % 12), "rejected": "1, 2, 3"[: 1 + n // 12]} for n in range(60)]
    store = store_of(base, write(tmp_path / "x.jsonl", *rows))
    asked = {
        split: {ids[: int(learnt.argmax())].tobytes() for (ids, learnt), _ in pairs}
        for split, pairs in store.pairs.items()
    }
    assert not asked["train"] & asked["val"]


def test_what_does_not_go_together_is_refused(base: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", *map(pair, range(6)))
    for words, sentence in (
        ([f"start={base}", f"data.path={file}", "loss.objective=next_token"], "do not go together"),
        ([f"start={base}", f"data.path={file}", "data.join=0.5"], "join and pack are for"),
        ([f"start={base}", f"data.path={file}", "loss.reduction=sum"], "is for next_token"),
        (
            [f"start={base}", f"data.path={file}", "loss.objective=ipo", "loss.label_smoothing=0.1"],
            "for dpo and",
        ),
        (
            [f"start={base}", f"data.path={file}", "loss.objective=kto", "train.accumulate=32"],
            "leave two pairs",
        ),
        ([f"start={base}", f"data.path={file}", "model.dropout=0.1"], "preferences take none"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            load_recipe("dpo", words)
    with pytest.raises(RecipeError, match="say start = MODEL"):
        build_session(load_recipe("dpo", [f"data.path={file}"]), lambda _: None)
    with pytest.raises(RecipeError, match="do not go together"):
        load_recipe("sft", [f"start={base}", f"data.path={file}", "loss.objective=dpo"])


def test_parts_of_a_step_add_up_to_the_step(base: Path) -> None:
    model = moesaic.load(base).model.train()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(20, (4, 9), generator=draw)
    target = torch.randint(20, (4, 9), generator=draw)
    target[0, 2:] = target[2, 5:] = -100
    whole = Batch(ids, target)
    for reduction in ("mean", "sum"):
        objective = next_token(LossOptions(reduction=reduction))
        grads = []
        for parts in (1, 2, 4):
            model.zero_grad()
            losses = [objective(model, part) for part in whole.split(parts)]
            for loss in losses:
                (loss.total / parts).backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            told = torch.stack([loss.parts["main"] for loss in losses]).mean()
            torch.testing.assert_close(told, objective(model, whole).parts["main"])
        for other in grads[1:]:
            for grad, expected in zip(other, grads[0], strict=True):
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert [part.share for part in Batch(ids, ids).split(4)] == [1.0] * 4
