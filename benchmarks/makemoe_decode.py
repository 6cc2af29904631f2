"""Decoding with the makeMoE model: ours against the plain reference, which recomputes its window.

Inside the window of 32 our cache holds everything; past it learned positions shift, so the window is
computed anew for every token, as in the reference, and the comparison is of the two computations.
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference
from timing import header, median_seconds

from moesaic.generate import SampleOptions, stream
from moesaic.model.transformer import LanguageModel
from moesaic.train.recipe import load_recipe

INSIDE, PAST = 31, 100


def main() -> None:
    print(header())
    torch.manual_seed(0)
    plain = reference.PlainMakeMoE(65).eval()
    model = LanguageModel(load_recipe("makemoe").model.model_copy(update={"vocab_size": 65})).eval()
    greedy = SampleOptions(temperature=0)

    def ours(prompt: torch.Tensor, tokens: int) -> int:
        return sum(1 for _ in stream(model, prompt, tokens, greedy))

    @torch.no_grad()
    def theirs(prompt: torch.Tensor, tokens: int) -> None:
        plain.generate(prompt, tokens, greedy=True)

    print(f"\n{'one stream':24} {'tokens':>7} {'plain tokens/s':>15} {'moesaic tokens/s':>17} {'×':>6}")
    for name, length, tokens in (("inside the window", 1, INSIDE), ("past the window", 32, PAST)):
        prompt = torch.zeros(1, length, dtype=torch.int64)
        contestants = {"plain": partial(theirs, prompt, tokens), "ours": partial(ours, prompt, tokens)}
        seconds = median_seconds(contestants, 5, 1)
        plain_rate, our_rate = tokens / seconds["plain"], tokens / seconds["ours"]
        print(f"{name:24} {tokens:7} {plain_rate:15.0f} {our_rate:17.0f} {our_rate / plain_rate:6.1f}")


if __name__ == "__main__":
    main()
