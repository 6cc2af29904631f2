"""Decoding an OLMoE-shaped model of four layers with its experts left in its files, in a quarter of its size.

Random weights in bf16, greedy, the same prompt. Three contestants, each a process of its own: the model in
memory, without a limit; ``offload.memory`` of a quarter of its bytes; and the same files memory-mapped, with
no slots of ours, so that the page cache alone keeps what was used. The last two run below one hard limit that
counts the page cache (limited.py). Ends with 1 where tokens differ.

    python benchmarks/streamed_experts.py --tokens 64
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limited import Limit, watch
from timing import header

import moesaic
from moesaic.files import human_size
from moesaic.generate import SampleOptions, stream
from moesaic.model.transformer import LanguageModel
from moesaic.offload.bank import OffloadedExperts
from moesaic.offload.experts import Room
from moesaic.offload.model import bytes_of, replace_banks, shape_of
from moesaic.offload.origins import Files
from moesaic.offload.records import Matrices
from moesaic.train.recipe import load_recipe
from moesaic.weights.hf import open_hf, write_hf

PROMPT, REPEATS = torch.arange(100, 132)[None], 4


class Mapped:
    """Matrices copied out of memory-mapped files whenever they are wanted."""

    def __init__(self, files: Files, shape: Any, experts: int) -> None:
        self.files, self.shape, self.experts, self.chunk = files, shape, experts, 8
        self.kept = 0
        self.maps = [np.memmap(path, np.uint8, "r") for path, _ in files.files]
        self.room = Room(shape, self.chunk)
        self.last: list[list[int]] = [[] for _ in files.file_LEN]

    def gather(
        self, layer: int, experts: Sequence[int], dtype: torch.dtype, *, keep: bool = False
    ) -> Matrices:
        first, down = self.room.of(len(experts), dtype)
        for n, expert in enumerate(experts):
            to = [first[n].flatten(), down[n].flatten()]
            cut = len(to[0])
            for piece, (begin, end) in enumerate(zip(self.files.bounds, self.files.bounds[1:], strict=False)):
                start = int(self.files.start_LEN[layer, expert, piece])
                raw = self.maps[self.files.file_LEN[layer, expert, piece]][start : start + 2 * (end - begin)]
                part = to[0][begin:end] if end <= cut else to[1][begin - cut : end - cut]
                part.view(torch.int16).numpy()[:] = raw.view(np.int16)
        return first, down

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """The kernel reads ahead as it likes."""

    def close(self) -> None:
        """Nothing is held but maps."""


def make(folder: Path) -> None:
    """The model as a Hugging Face directory in shards."""
    recipe = load_recipe("olmoe-1b-7b", ["model.layers=4", "model.vocab_size=50304"])
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LanguageModel(recipe.model)
    write_hf(folder, recipe.model, model, {}, [])


def decode(kind: str, folder: Path, memory: int, tokens: int) -> None:
    """What a contestant's process does: prints its tokens and its rates as JSON."""
    lm = moesaic.load(folder, memory=None if kind == "in memory" else memory)
    if kind == "mapped":
        files, config = open_hf(folder).experts(), lm.config
        source = Mapped(files, shape_of(config), config.experts.count)
        banks = [OffloadedExperts(source, layer, trains=False) for layer in range(len(config.moe_layers))]
        replace_banks(lm.model, banks)
    lm.lay_out()
    rates, found = [], []
    for _ in range(REPEATS):
        steps = stream(lm.model, PROMPT, tokens + 1, SampleOptions(temperature=0))
        found = [int(next(steps)[0])]
        start = time.perf_counter()
        found += [int(token[0]) for token in steps]
        rates.append(tokens / (time.perf_counter() - start))
    print(json.dumps({"tokens": found, "rates": rates}))


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--limit", default="2.5GB", help="of the two that read from disk")
    arguments.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "MEMORY"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        decode(given.child[0], Path(given.child[1]), int(given.child[2]), given.tokens)
        return 0
    print(header())
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        memory, answers = size // 4, {}
        print(f"{human_size(size)} on disk; offload.memory={human_size(memory)}")
        for kind in ("in memory", "offload.memory", "mapped"):
            words = [sys.executable, __file__, "--tokens", str(given.tokens)]
            with Limit(None if kind == "in memory" else bytes_of(given.limit)) as limit:
                child = limit.start([*words, "--child", kind, folder, str(memory)], stdout=subprocess.PIPE)
                seen = watch(child, limit)
                assert child.stdout is not None
                answer = answers[kind] = json.loads(child.stdout.read().splitlines()[-1])
            rates = ", ".join(f"{rate:.2f}" for rate in answer["rates"])
            print(f"{kind:15s} tokens/s: {rates}; VmHWM {human_size(seen.resident)}")
            print(f"{'':15s} limit: {limit.verdict()}")
    same = len({tuple(answer["tokens"]) for answer in answers.values()}) == 1
    print("the same tokens" if same else "tokens DIFFER")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
