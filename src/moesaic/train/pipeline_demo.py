"""``moesaic demo-pipeline``: OLMoE's stages from nothing, each measured for what it is there for."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesaic.analysis.compare import held_out, losses_of
from moesaic.analysis.evaluate import evaluate
from moesaic.analysis.report import analyse
from moesaic.analysis.scoring import score
from moesaic.data.chat import load_template
from moesaic.data.examples import ExampleStore
from moesaic.data.instructions import Example, tokens_of
from moesaic.data.lessons import write_pairs, write_questions
from moesaic.data.preferences import PreferenceStore
from moesaic.data.pretrain import prepare
from moesaic.data.readers import read_rows
from moesaic.data.roles import write_roles
from moesaic.data.store import Store
from moesaic.export import export_model
from moesaic.lm import LM, load
from moesaic.train.loop import train
from moesaic.train.merge_chain import TEMPLATE
from moesaic.train.recipe import load_recipe

Say = Callable[[str], None]
_MOST_LINE = 2**22
_SHAPE: list[str] = []  # overrides of the model and its text, for a smaller one


@dataclass(frozen=True)
class Lengths:
    """Steps of each stage, and questions of each role."""

    pretrain: int = 380
    anneal: int = 120
    sft: int = 140
    dpo: int = 60
    questions: int = 12


def run_pipeline_demo(
    out: Console, root: Path, seed: int, say: Say, program: str, lengths: Lengths = Lengths()
) -> Path:
    """Prepare, pretrain, anneal, fine-tune, prefer, evaluate, analyse; the final model's directory."""
    started = time.perf_counter()
    say("writing conversations, pairs and questions from rules and from Python's own library")
    root.mkdir(parents=True, exist_ok=True)
    roles = write_roles(root / "roles", seed=seed)
    pairs = write_pairs(roles, root / "pairs.jsonl", 150, seed)
    folder = write_questions(roles, root / "questions", lengths.questions, seed)
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    common = [f"seed={seed}", f"data.cache={root / 'cache'}"]
    talk = [*common, f"data.template={root / 'chat_template.jinja'}", "train.seq_len=256"]
    data = [f"data.path.{role}={file}" for role, file in roles.items()]
    stages: dict[str, Path] = {}

    def stage(name: str, recipe: str, steps: int, words: list[str]) -> None:
        run = root / name
        if not (run / "model").is_dir():
            say(f"{name}: {steps} steps of {recipe}")
            every = max(1, steps // 3)
            start = [f"start={list(stages.values())[-1]}"] if stages else []
            more = [f"out={run}", f"train.steps={steps}", f"eval.every={steps}", f"checkpoint.every={every}"]
            resumed = (run / "recipe.toml").exists()
            chosen = (
                load_recipe(str(run), resume=True)
                if resumed
                else load_recipe(recipe, [*start, *more, *words])
            )
            train(chosen, resume=resumed, console=Console(quiet=True))
        stages[name] = run

    small = ["train.batch_size=16", "train.accumulate=1"]
    stage("pretrained", "olmoe-nano", lengths.pretrain, [*common, *_SHAPE, "checkpoint.keep=4"])
    anneal = [*small, "train.seq_len=256", "train.precision=auto", "optim.lr=3e-4", "data.source=stdlib"]
    anneal += [
        "data.val_fraction=0.04",
        *(word for word in _SHAPE if word.startswith("data.")),
    ]  # as pretraining
    stage("annealed", "olmoe-1b-7b-anneal", lengths.anneal, [*common, *anneal])
    stage("fine-tuned", "sft", lengths.sft, [*talk, *data, *small, "optim.lr=1e-3", "schedule.warmup=10"])
    prefer = [*talk, f"data.path.pairs={pairs}", *small, "optim.lr=1e-4", "schedule.warmup=5"]
    stage("preferred", "dpo", lengths.dpo, prefer)
    _measure(out, stages, _stores(stages, talk, data, pairs), folder, say)
    final = root / "final"
    if not final.exists():
        export_model(stages["preferred"], final)
    texts = [f"{role}={roles[role]}" for role in ("coder", "thinker", "writer")]
    analysis = analyse([stages["pretrained"]], texts, 20_000, 256, 10, say)
    analysis.write(root / "analysis")
    for label, value in analysis.rows():
        out.print(Text(f"{label:36} {value}"), soft_wrap=True)
    out.print(Text(f"\n{time.perf_counter() - started:.0f} s. Figures: {root / 'analysis'}"), soft_wrap=True)
    out.print(Text(f"It opens in stock transformers: {final}\n{program} chat {final}"), soft_wrap=True)
    return final


def _stores(
    stages: dict[str, Path], talk: list[str], data: list[str], pairs: Path
) -> tuple[Store, ExampleStore, PreferenceStore]:
    """The held-out text, conversations and pairs that every stage is measured on."""
    start = f"start={stages['pretrained']}"
    text = prepare(load_recipe(str(stages["pretrained"] / "recipe.toml")).data)
    examples = prepare(load_recipe("sft", [start, *talk, *data]).data, seq_len=256)
    preferences = prepare(load_recipe("dpo", [start, *talk, f"data.path.pairs={pairs}"]).data, seq_len=256)
    assert isinstance(examples, ExampleStore)
    assert isinstance(preferences, PreferenceStore)
    return text, examples, preferences


def _measure(
    out: Console,
    stages: dict[str, Path],
    stores: tuple[Store, ExampleStore, PreferenceStore],
    questions: Path,
    say: Say,
) -> None:
    """Print what each stage is there for, in bold, beside all else that it does."""
    text, examples, preferences = stores
    table = Table(title="each stage on held-out data", title_justify="left", title_style="bold")
    columns = ("text, bits per byte", "answers, nats per token", "pairs preferred", "questions right")
    table.add_column("after")
    for name in columns:
        table.add_column(name, justify="right")
    aims = {"pretrained": 0, "annealed": 0, "fine-tuned": 1, "preferred": 2}
    for name, run in stages.items():
        say(f"measuring {name}")
        lm = load(run)
        bits = _bits_per_byte(lm, text)
        sums, counts = losses_of(lm.model, held_out(examples), 256)
        right = _questions_right(lm, questions)
        values = [
            f"{bits:.4f}",
            f"{sums.sum() / counts.sum():.4f}",
            f"{_preferred(lm, preferences):.3f}",
            right,
        ]
        cells = [Text(v, style="bold" if n == aims[name] else "") for n, v in enumerate(values)]
        table.add_row(name, *cells)
    out.print(table)
    out.print(
        Text(
            "Bold is what the stage is there for. Pairs: the polite answer is likelier than the plain one, "
            "per token. Questions: the right one of four answers is likeliest, per token; chance is 0.25."
        ),
        soft_wrap=True,
    )


def _bits_per_byte(lm: LM, text: Store) -> float:
    loss = evaluate(lm.model, text, 32, 256).loss
    return loss / text.bytes_per_token("val") / math.log(2)


@torch.inference_mode()
def _preferred(lm: LM, store: PreferenceStore) -> float:
    """The share of held-out pairs whose chosen answer is likelier, per token, than the rejected one."""
    right = 0
    for pair in store.pairs["val"]:
        means = []
        for ids, learnt in pair:
            begin = int(learnt.argmax())
            after = ids[begin:].tolist()
            (found,) = score(lm.model, [(ids[:begin].tolist(), after)], lm.config.context)
            means.append(found.logprob / len(after))
        right += means[0] > means[1]
    return right / len(store.pairs["val"])


def _questions_right(lm: LM, folder: Path) -> str:
    template, right, total = load_template(lm.path), 0, 0
    for where, row in read_rows(folder / "mmlu_val.jsonl", _MOST_LINE):
        pairs = []
        for choice in row["choices"]:
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": choice}]
            ids, learnt = tokens_of(Example(turns, "", "", where), lm.tokenizer, template)
            begin = int(learnt.argmax())
            pairs.append((ids[:begin].tolist(), ids[begin:].tolist()))
        means = [
            s.logprob / len(p[1])
            for s, p in zip(score(lm.model, pairs, lm.config.context), pairs, strict=True)
        ]
        right += max(range(4), key=means.__getitem__) == row["answer"]
        total += 1
    return f"{right / total:.3f}"
