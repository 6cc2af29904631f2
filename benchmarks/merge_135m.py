"""Eight models of SmolLM2-135M's shape (random weights, true sizes): merged, the router fitted and trained,
opened by stock transformers. Time and peak memory of each stage, each in a process of its own.

    python benchmarks/merge_135m.py --out /somewhere --steps 50
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from timing import header

from moesaic.data.roles import write_roles
from moesaic.data.tokenizers import Tokenizer
from moesaic.model.attention import AttentionOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import FFNOptions
from moesaic.model.transformer import LanguageModel
from moesaic.weights.hf import tokenizer_files, write_hf

SHAPE = ModelConfig(
    layers=30,
    width=576,
    vocab_size=49_152,
    context=8192,
    pattern="D",
    tied=True,
    attention=AttentionOptions(heads=9, kv_heads=3, rope_theta=100_000.0),
    ffn=FFNOptions(hidden=1536),
)
MOESAIC = [sys.executable, "-c", "from moesaic.cli import main; main()"]
OPEN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
ids = model.generate(torch.arange(100, 110)[None], max_new_tokens=8, do_sample=False, pad_token_id=0)
print(type(model).__name__, sum(p.numel() for p in model.parameters()), ids.shape[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/merge-135m"))
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    print(header(), flush=True)
    home, roles = args.out, write_roles(args.out / "roles", rows=100)
    make_donors(home, list(roles))
    command = [*MOESAIC, "merge"]
    donors = ["--base", str(home / "base")]
    donors += [word for role in roles for word in ("--expert", f"{role}={home / role}")]
    text = [word for role, file in roles.items() for word in ("--calibration", f"{role}={file}")]
    paths = [f"data.path.{role}={file}" for role, file in roles.items()]
    train = [f"start={home / 'ridge'}", *paths, f"train.steps={args.steps}", f"out={home / 'run'}"]
    train += ["train.batch_size=2", "train.seq_len=128", f"eval.every={args.steps}", "checkpoint.every=1000"]
    stages = {
        "merge, random router": [*command, str(home / "random"), *donors],
        "merge, ridge router": [*command, str(home / "ridge"), *donors, *text],
        f"router, {args.steps} steps of 2 × 128": [*MOESAIC, "train", "router", *train],
        "export": [*MOESAIC, "export", str(home / "run"), str(home / "final")],
        "opened by transformers": [sys.executable, "-c", OPEN, str(home / "final")],
    }
    print(f"\n{'stage':34} {'seconds':>8} {'peak GB':>8}")
    for name, words in stages.items():
        started = time.perf_counter()
        done, peak = run(words)
        print(f"{name:34} {time.perf_counter() - started:8.1f} {peak / 1e9:8.2f}", flush=True)
    print(done)
    table = json.loads((home / "final" / "config.json").read_text())
    print(f"{table['architectures'][0]}: {', '.join(table['expert_names'])}")


def make_donors(home: Path, roles: list[str]) -> None:
    """The base and an expert of each role: its networks and their norms differ from the base's."""
    if (home / "base").exists():
        return
    draw = random.Random(0)
    words = "".join(chr(draw.randrange(97, 123)) for _ in range(200_000))
    tokenizer = Tokenizer.bpe([words[i : i + 9] for i in range(0, len(words), 9)], 2048)
    torch.manual_seed(0)
    model = LanguageModel(SHAPE).bfloat16()
    write_hf(home / "base", SHAPE, model, tokenizer_files(tokenizer), [0])
    for role in roles:
        for name, parameter in model.named_parameters():
            if ".mlp." in name or "post_attention" in name:
                parameter.data.mul_(1 + 0.05 * torch.randn_like(parameter))
        write_hf(home / role, SHAPE, model, tokenizer_files(tokenizer), [0])


def run(words: list[str]) -> tuple[str, int]:
    """What a command prints, and the most memory that it held, in bytes."""
    wrap = (
        "import resource, subprocess, sys;"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
        "print(done.stdout); print(done.stderr[-2000:], file=sys.stderr);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", wrap, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[:5])}: {done.stderr}")
    *printed, peak = done.stdout.strip().splitlines()
    return "\n".join(printed).strip(), int(peak)


if __name__ == "__main__":
    main()
