"""Greedy tokens of llama.cpp against ours, for every family that it knows; one line each.

Trains tiny models on a made-up text for a minute in all, exports each as GGUF in f32 and f16, and lets
llama-cpp-python, in the interpreter given, continue a prompt by 32 tokens. Exits 1 if any differs.

    python benchmarks/gguf_llama_cpp.py PYTHON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic.generate import SampleOptions, stream

FAMILIES = {
    "olmoe": ["model.attention.qk_norm=full"],
    "mixtral": [
        "model.router.renormalize=true",
        "model.attention.kv_heads=1",
        "model.attention.rope_theta=1e6",
    ],
    "qwen3-moe": [
        *("model.attention.qk_norm=head", "model.tied=true", "model.router.renormalize=true"),
        "model.attention.head_dim=32",
    ],
    "qwen2-moe": [
        *(
            "model.attention.qkv_bias=true",
            "model.experts.shared_hidden=32",
            "model.experts.shared_gate=true",
        ),
    ],
    "llama": ["model.pattern=D"],
    "qwen2": ["model.pattern=D", "model.attention.qkv_bias=true"],
    "qwen3": ["model.pattern=D", "model.attention.qk_norm=head", "model.tied=true"],
    "olmo2": ["model.pattern=D", "model.attention.qk_norm=full", "model.norm_position=post"],
    "characters": ["model.attention.qk_norm=full", "data.tokenizer=char"],
    "bytes": ["model.attention.qk_norm=full", "data.tokenizer=byte"],
}
PROMPT, TOKENS = "the old mill", 32

LLAMA = """
import json, sys, llama_cpp
path, prompt, ids, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
model = llama_cpp.Llama(path, n_ctx=128, verbose=False, n_threads=1)
told = []
for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
    told.append(token)
    if len(told) == tokens:
        break
print(json.dumps([model.tokenize(prompt.encode(), add_bos=False), told]))
"""


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from tiny_runs import run_tiny

    shape = ["model.width=64", "model.context=128", "model.experts.hidden=64", "model.ffn.hidden=96"]
    training = ["train.steps=60", "optim.lr=5e-3", "data.tokenizer=bpe", "data.vocab_size=300"]
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        for name, words in FAMILIES.items():
            run = run_tiny(Path(folder), name, *shape, *training, *words)
            lm = moesaic.load(run)
            ids = lm.ids(PROMPT)
            ours = [int(t) for t in stream(lm.model, ids, TOKENS, SampleOptions(temperature=0))]
            for kind in ("f32", "f16"):
                file = Path(folder) / f"{name}-{kind}.gguf"
                architecture = moesaic.export_model(run, file, "gguf", kind)
                asked = [str(file), PROMPT, json.dumps(ids[0].tolist()), str(TOKENS)]
                told = subprocess.run(
                    [sys.argv[1], "-c", LLAMA, *asked], capture_output=True, text=True, check=True
                )
                their_ids, theirs = json.loads(told.stdout.splitlines()[-1])
                same = sum(a == b for a, b in zip(ours, theirs, strict=True))
                words_agree = "same" if their_ids == ids[0].tolist() else "OTHER"
                lines.append(
                    f"{name:11} as {architecture:9} {kind}: {same}/{TOKENS} tokens, {words_agree} prompt"
                )
                failed |= same < TOKENS or words_agree != "same"
    print("\n".join(lines))
    sys.exit(failed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
