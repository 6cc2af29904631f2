"""One training step of the makeMoE model: ours against the plain reference of tests/reference.py.

Both in float32 with dropout and router noise; the reference has one module per expert and per head,
Python loops and unfused AdamW. Ours also under bf16 autocast.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import reference
from timing import header, median_seconds

from moesaic.machine import keep_freed_memory
from moesaic.model.transformer import LanguageModel
from moesaic.train.objectives import Batch, next_token
from moesaic.train.optim import build_optimizers
from moesaic.train.recipe import load_recipe


def main() -> None:
    print(header())
    keep_freed_memory()
    recipe = load_recipe("makemoe")
    config = recipe.model.model_copy(update={"vocab_size": 65})
    torch.manual_seed(0)
    window_BT = torch.randint(65, (recipe.train.batch_size, recipe.train.seq_len + 1))
    ids_BT, target_BT = window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous()

    plain = reference.PlainMakeMoE(65)
    plain_optimizer = reference.plain_optimizer(plain)

    def plain_step() -> None:
        reference.plain_step(plain, plain_optimizer, ids_BT, target_BT)

    def ours(precision: str) -> "Step":
        return Step(config, recipe, Batch(ids_BT, target_BT), precision)

    contestants = {
        "plain reference, fp32": plain_step,
        "moesaic, fp32": ours("fp32"),
        "moesaic, bf16": ours("bf16"),
    }
    seconds = median_seconds(contestants)
    flops = 3 * ids_BT.numel() * config.flops_per_token(recipe.train.seq_len)
    print(f"\n{'training step, 512 tokens':28} {'ms':>8} {'GFLOP/s':>9} {'× plain':>8}")
    base = seconds["plain reference, fp32"]
    for name, value in seconds.items():
        print(f"{name:28} {1000 * value:8.1f} {flops / value / 1e9:9.0f} {base / value:8.2f}")


class Step:
    """Forward, backward and update, as in the reference; the loop's own duties are not in either."""

    def __init__(self, config, recipe, batch, precision):
        torch.manual_seed(0)
        self.model = LanguageModel(config).train()
        self.optimizers = build_optimizers(self.model, recipe.optim)
        self.objective = next_token(recipe.loss)
        self.batch, self.bf16 = batch, precision == "bf16"

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.model, self.batch)
        loss.total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
