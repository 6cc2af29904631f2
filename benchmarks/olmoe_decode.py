"""Decoding one stream with an OLMoE-shaped model of few layers: ours, transformers, and perhaps llama.cpp.

Random weights in bf16 (llama.cpp: bf16 and q8_0), greedy, one prompt of 16 tokens. The limit is what the
machine reads per second over the bytes of the weights that a token uses. llama.cpp runs in the interpreter
given by ``--llama`` (one with llama-cpp-python).

    python benchmarks/olmoe_decode.py --tokens 32 --llama PYTHON
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from timing import header

from moesaic.generate import SampleOptions, stream
from moesaic.machine import read_bandwidth
from moesaic.model.attention import AttentionOptions
from moesaic.model.config import ModelConfig
from moesaic.model.experts import ExpertOptions
from moesaic.model.packed import pack
from moesaic.model.routers import TopKOptions
from moesaic.model.transformer import LanguageModel
from moesaic.weights.gguf import write_gguf
from moesaic.weights.hf import load_hf, write_hf

LLAMA = """
import sys, time, statistics, llama_cpp
path, tokens, repeats, threads = sys.argv[1], *map(int, sys.argv[2:])
model = llama_cpp.Llama(path, n_ctx=512, verbose=False, n_threads=threads, n_threads_batch=threads)
rates = []
for _ in range(repeats + 1):
    model.reset()
    stream = model.generate(list(range(100, 116)), temp=0.0, top_k=1, repeat_penalty=1.0)
    next(stream)
    start = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    rates.append(tokens / (time.perf_counter() - start))
print(statistics.median(rates[1:]))
"""


def rate_of_ours(model: LanguageModel, tokens: int, repeats: int) -> float:
    rates = []
    prompt = torch.arange(100, 116)[None]
    for _ in range(repeats + 1):
        steps = stream(model, prompt, tokens + 1, SampleOptions(temperature=0))
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates[1:])


@torch.inference_mode()
def rate_of_transformers(directory: Path, kind: str, tokens: int, repeats: int) -> float:
    """Stock ``generate``: the time of ``tokens`` more tokens than one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation=kind).eval()
    prompt, rates = torch.arange(100, 116)[None], []

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    for _ in range(repeats + 1):
        rates.append(tokens / (seconds(tokens + 1) - seconds(1)))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llama", help="a Python interpreter that has llama-cpp-python")
    args = parser.parse_args()
    print(header(), flush=True)
    config = ModelConfig(
        layers=args.layers,
        width=2048,
        vocab_size=50_304,
        context=4096,
        attention=AttentionOptions(heads=16, qk_norm="full"),
        experts=ExpertOptions(count=64, hidden=1024),
        router=TopKOptions(top_k=8),
    )
    torch.manual_seed(0)
    model = LanguageModel(config).bfloat16().eval()
    active = config.parameters().active - config.vocabulary * config.width
    bandwidth, rows = read_bandwidth(), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_hf(home / "hf", config, model, {}, [])
        rows.append(("moesaic, bf16 as stored", rate_of_ours(model, args.tokens, args.repeats), 2))
        rows.append(
            ("moesaic, bf16 packed", rate_of_ours(pack(model, "packed"), args.tokens, args.repeats), 2)
        )
        del model
        _, model = load_hf(home / "hf", "cpu", print)
        if args.llama:
            for kind in ("bf16", "q8_0"):
                write_gguf(home / f"{kind}.gguf", config, model, None, name="bench", kind=kind, eos=[])
        rows.append(("moesaic, int8", rate_of_ours(pack(model, "int8"), args.tokens, args.repeats), 1))
        del model
        for kind in ("grouped_mm", "eager"):
            rate = rate_of_transformers(home / "hf", kind, args.tokens, args.repeats)
            rows.append((f"transformers, bf16 {kind}", rate, 2))
        for kind in ("bf16", "q8_0") if args.llama else ():
            words = [args.llama, "-c", LLAMA, str(home / f"{kind}.gguf"), str(args.tokens), str(args.repeats)]
            run = subprocess.run(
                [*words, str(torch.get_num_threads())], capture_output=True, text=True, check=True
            )
            rows.append(
                (f"llama.cpp, {kind}", float(run.stdout.split()[-1]), 2 if kind == "bf16" else 1.0625)
            )
    print(f"\n{'one stream, ' + str(args.layers) + ' layers':30} {'tokens/s':>9} {'of the limit':>13}")
    for name, rate, size in rows:
        print(f"{name:30} {rate:9.1f} {rate * active * size / bandwidth:13.2f}")


if __name__ == "__main__":
    main()
