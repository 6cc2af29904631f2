"""The `char` recipe against a dense model of equal active size, in equal wall-clock time.

Each contestant trains for every budget (seconds, evaluation counted) with its schedule spread over it; the
number of steps is set from its own measured pace. Budgets of up to two minutes see the text less than twice
and go without dropout and decay, at twice the rate. Every run is printed as it ends, then the medians and
ranges over the seeds.

    python benchmarks/char_budget.py data.path=FILE
    python benchmarks/char_budget.py data.path=FILE --budgets 30 90 --models sparse --seeds 1 2
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from timing import header

from moesaic.train.loop import train
from moesaic.train.measure import measure
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import read_rows
from moesaic.train.session import build_session

SHORT = ["model.dropout=0", "optim.weight_decay=0", "optim.lr=2e-2"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[30, 90, 600])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=["sparse", "dense"], default=["sparse", "dense"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(header(), flush=True)
    table = []
    for budget in args.budgets:
        for name in args.models:
            recipe = load_recipe("char", [*(SHORT if budget <= 120 else []), *args.overrides])
            if name == "dense":
                recipe = recipe.model_copy(update={"model": recipe.model.dense_twin()})
            steps, losses = affordable(recipe, budget), []
            for seed in args.seeds:
                seconds, loss = run(recipe, steps, seed)
                losses.append(loss)
                print(
                    f"{budget:.0f} s  {name:6}  seed {seed}  {steps:5} steps  {seconds:6.1f} s  {loss:.4f}",
                    flush=True,
                )
            table.append((budget, name, sorted(losses)))
    print(f"\n{'budget':>8} {'model':8} {'held-out loss: median (range)':>34}")
    for budget, name, losses in table:
        spread = f"{statistics.median(losses):.4f} ({losses[0]:.4f}–{losses[-1]:.4f})"
        print(f"{budget:7.0f}s {name:8} {spread:>34}")


def affordable(recipe: Recipe, budget: float) -> int:
    """How many steps fit into ``budget`` seconds with one evaluation, at the pace of 60 real ones.

    Five in a hundred are kept back: once experts differ in load, steps are slower than the first are.
    """
    cost = measure(build_session(recipe, lambda text: None), repeats=60)
    return max(1, int(0.95 * (budget - cost.eval_seconds) / cost.step_seconds))


def run(recipe: Recipe, steps: int, seed: int) -> tuple[float, float]:
    """Train for ``steps``; seconds by the run's own clock, evaluation counted, and the held-out loss."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        evaluation = recipe.eval.model_copy(update={"every": steps, "sample": 0})
        training = recipe.train.model_copy(update={"steps": steps})
        chosen = {"seed": seed, "out": out, "train": training, "eval": evaluation}
        path = train(recipe.model_copy(update=chosen), console=Console(quiet=True))
        last = read_rows(path / "metrics.jsonl")[-1]
        return last["time"], last["loss"]


if __name__ == "__main__":
    main()
