"""Decoding one stream with an OLMoE-shaped model of few layers: ours, transformers, and perhaps llama.cpp.

Random weights in bf16 (llama.cpp: bf16 and q8_0), greedy, one prompt of 16 tokens. All take turns, since what
a shared machine reads per second changes within minutes; the limit is that rate, measured just before each
turn, over the bytes of the weights that a token uses. llama.cpp runs in the interpreter given by ``--llama``
(one with llama-cpp-python).

    python benchmarks/olmoe_decode.py --tokens 32 --llama PYTHON
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timing import header

from moesaic.generate import SampleOptions, stream
from moesaic.machine import read_bandwidth
from moesaic.model.packed import pack
from moesaic.model.transformer import LanguageModel
from moesaic.train.recipe import load_recipe
from moesaic.weights.gguf import write_gguf
from moesaic.weights.hf import load_hf, write_hf

LLAMA = """
import sys, time, llama_cpp
path, tokens, threads = sys.argv[1], *map(int, sys.argv[2:])
model = llama_cpp.Llama(path, n_ctx=512, verbose=False, n_threads=threads, n_threads_batch=threads)
for _ in sys.stdin:
    model.reset()
    stream = model.generate(list(range(100, 116)), temp=0.0, top_k=1, repeat_penalty=1.0)
    next(stream)
    start = time.perf_counter()
    for _ in range(tokens):
        next(stream)
    print(tokens / (time.perf_counter() - start), flush=True)
"""
PROMPT = torch.arange(100, 116)[None]


def ours(model: LanguageModel, tokens: int) -> Callable[[], float]:
    """Something that decodes once and says how many tokens per second."""

    def rate() -> float:
        steps = stream(model, PROMPT, tokens + 1, SampleOptions(temperature=0))
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        return tokens / (time.perf_counter() - start)

    return rate


def of_transformers(directory: Path, kind: str, tokens: int) -> Callable[[], float]:
    """Stock ``generate``: the time of ``tokens`` more tokens than one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, experts_implementation=kind).eval()

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(PROMPT, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        return time.perf_counter() - start

    return lambda: tokens / (seconds(tokens + 1) - seconds(1))


def of_llama(python: str, path: Path, tokens: int) -> Callable[[], float]:
    """llama.cpp in a process of its own, which decodes when it is told to."""
    words = [python, "-c", LLAMA, str(path), str(tokens), str(torch.get_num_threads())]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    send, receive = process.stdin, process.stdout

    def rate() -> float:
        send.write("go\n")
        send.flush()
        return float(receive.readline())

    return rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--llama", help="a Python interpreter that has llama-cpp-python")
    args = parser.parse_args()
    print(header(), flush=True)
    config = load_recipe("olmoe-1b-7b", [f"model.layers={args.layers}"]).model
    torch.manual_seed(0)
    model = LanguageModel(config).bfloat16().eval()
    active = config.parameters().active - config.vocabulary * config.width
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_hf(home / "hf", config, model, {}, [])
        for kind in ("bf16", "q8_0") if args.llama else ():
            write_gguf(home / f"{kind}.gguf", config, model, None, name="bench", kind=kind, eos=[])
        contestants = {"moesaic, bf16 packed": (ours(pack(model, "packed"), args.tokens), 2.0)}
        _, stored = load_hf(home / "hf", "cpu", print)
        contestants["moesaic, bf16 as stored"] = ours(stored, args.tokens), 2.0
        _, eight = load_hf(home / "hf", "cpu", print)
        contestants["moesaic, int8"] = ours(pack(eight, "int8"), args.tokens), 1.0
        contestants["transformers, bf16 grouped_mm"] = (
            of_transformers(home / "hf", "grouped_mm", args.tokens),
            2.0,
        )
        if args.llama:
            contestants["llama.cpp, bf16"] = of_llama(args.llama, home / "bf16.gguf", args.tokens), 2.0
            contestants["llama.cpp, q8_0"] = of_llama(args.llama, home / "q8_0.gguf", args.tokens), 1.0625
        rates: dict[str, list[float]] = {name: [] for name in contestants}
        limits: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(args.repeats + 1):  # the first is to warm up
            for name, (rate, size) in contestants.items():
                limit = read_bandwidth(2**26) / (active * size)
                if turn:
                    limits[name].append(limit)
                    rates[name].append(rate())
                else:
                    rate()
    print(f"\n{'one stream, ' + str(args.layers) + ' layers':30} {'tokens/s':>9} {'the limit':>10}")
    for name in contestants:
        print(f"{name:30} {statistics.median(rates[name]):9.1f} {statistics.median(limits[name]):10.1f}")


if __name__ == "__main__":
    main()
