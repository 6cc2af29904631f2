"""Greedy tokens of llama.cpp against ours, for every family that it knows and for merges; a line each.

Trains tiny models on a made-up text for a minute in all, merges experts of the dense ones, exports each as
GGUF in f32 and f16, and lets llama-cpp-python, in the interpreter given, continue a prompt by 32 tokens.
Exits 1 if any differs.

    python benchmarks/gguf_llama_cpp.py PYTHON
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import moesaic
from moesaic.errors import RecipeError
from moesaic.generate import SampleOptions, stream
from moesaic.merge.merge import merge
from moesaic.merge.options import MergeOptions

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
MERGED = ("llama", "qwen2", "qwen3", "olmo2")  # dense models that merges are made of, Mistral being as Llama
REFUSED = ("merged olmo2",)  # llama.cpp has no FlexOlmo
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
    equal = True
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        runs = {name: run_tiny(root, name, *shape, *training, *words) for name, words in FAMILIES.items()}
        for name, run in runs.items():
            equal &= compare(name, run, root)
        for name in MERGED:
            equal &= compare(f"merged {name}", merged(name, runs[name], root), root)
    sys.exit(not equal)


def merged(name: str, run: Path, root: Path) -> Path:
    """Three experts that were moved away from the trained model, and their merge with a random router."""
    from dense_donors import change

    base = root / f"{name}-base"
    moesaic.export_model(run, base)
    (base / "manifest.json").unlink()  # its checksums are not those of the copies
    experts = {
        str(n): str(change(base, root / f"{name}-{n}", n, ".mlp.", "post_attention")) for n in range(3)
    }
    router = {"init": "random", "std": 0.5}
    table = {"base": str(base), "experts": experts, "router": router, "renormalize": name != "qwen2"}
    merge(MergeOptions.model_validate(table), root / f"{name}-merged", lambda _: None)
    return root / f"{name}-merged"


def compare(name: str, model: Path, root: Path) -> bool:
    """Print how many greedy tokens are the same in f32 and f16, or why there is no GGUF; whether all are."""
    lm = moesaic.load(model)
    ids = lm.ids(PROMPT)
    ours = [int(t) for t in stream(lm.model, ids, TOKENS, SampleOptions(temperature=0))]
    equal = True
    for kind in ("f32", "f16"):
        file = root / f"{name}-{kind}.gguf"
        try:
            architecture = moesaic.export_model(model, file, "gguf", kind)
        except RecipeError as error:
            print(f"{name}: {error}", flush=True)
            return name in REFUSED
        asked = [str(file), PROMPT, json.dumps(ids[0].tolist()), str(TOKENS)]
        told = subprocess.run([sys.argv[1], "-c", LLAMA, *asked], capture_output=True, text=True, check=True)
        their_ids, theirs = json.loads(told.stdout.splitlines()[-1])
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        words = "same" if their_ids == ids[0].tolist() else "OTHER"
        print(f"{name:13} as {architecture:9} {kind}: {same}/{TOKENS} tokens, {words} prompt", flush=True)
        equal &= same == TOKENS and words == "same"
    return equal


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
