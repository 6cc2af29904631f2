"""Evaluation by lm-evaluation-harness with our model in process, against its own ``--model hf``, on one
directory.

    python benchmarks/eval_speed.py MMLU_FOLDER --limit 25 --subjects 3

A random model of OLMoE's shape (width 2048, 64 experts of 1,024, top-8) with 4 layers, in bfloat16; MMLU with
five examples, so many questions of each of ``--subjects`` subjects. Both give the same accuracy; seconds and
their ratio are printed. The more questions a subject has, the more is saved: its examples are read once.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from timing import header

import moesaic
from moesaic.analysis.harness import harness_model
from moesaic.analysis.tasks import local_tasks
from moesaic.data.tokenizers import Tokenizer
from moesaic.model.transformer import LanguageModel
from moesaic.train.recipe import load_recipe
from moesaic.weights.hf import tokenizer_files, write_hf

SHAPE = load_recipe("olmoe-1b-7b", ["model.layers=4"]).model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with mmlu_dev.jsonl and mmlu_val.jsonl")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(header(), flush=True)
    tasks = local_tasks("mmlu", args.folder, args.limit)[: args.subjects]
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(Path(folder) / "model", args.folder)
        seconds: dict[str, list[float]] = {"moesaic": [], "hf": []}
        accuracy, asked = {}, 0
        for _ in range(args.rounds):
            for name in seconds:
                model = (
                    harness_model(moesaic.load(path), print)
                    if name == "moesaic"
                    else HFLM(pretrained=str(path), device="cpu", dtype="bfloat16", batch_size=4)
                )
                started = time.perf_counter()
                found = lm_eval.simple_evaluate(
                    model=model, tasks=tasks, bootstrap_iters=0, log_samples=False
                )
                seconds[name].append(time.perf_counter() - started)
                asked = sum(counts["effective"] for counts in found["n-samples"].values())
                accuracy[name] = [round(v["acc,none"], 4) for v in found["results"].values()]
                del model
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    ratios = sorted(other / own for own, other in zip(seconds["moesaic"], seconds["hf"], strict=True))
    print(f"{asked} questions; accuracies of a random model: {accuracy}")
    print(f"median ratio {ratios[len(ratios) // 2]:.2f} (range {ratios[0]:.2f} to {ratios[-1]:.2f})")


def make_model(path: Path, folder: Path) -> Path:
    """Random weights, and a tokenizer that has seen the questions."""
    tokenizer = Tokenizer.bpe([(folder / "mmlu_dev.jsonl").read_text(encoding="utf-8")], 8192)
    torch.manual_seed(0)
    model = LanguageModel(SHAPE).bfloat16()
    write_hf(path, SHAPE, model, tokenizer_files(tokenizer), [tokenizer.eos_id or 0])
    return path


if __name__ == "__main__":
    main()
