"""The `char` recipe against a dense model of equal active size, in equal wall-clock time.

Each contestant trains for every budget (seconds, evaluation counted) with its schedule spread over it; the
number of steps is set from its own measured pace. Three seeds; the table has the median and the range.

    python benchmarks/char_budget.py data.path=FILE
    python benchmarks/char_budget.py --budgets 30 90 --seeds 1 data.path=FILE
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=[30, 90, 600])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    print(header())
    sparse = load_recipe("char", args.overrides)
    dense = sparse.model_copy(update={"model": sparse.model.dense_twin()})
    print(f"\n{'budget':>8} {'model':8} {'steps':>7} {'seconds':>8} {'held-out loss: median (range)':>34}")
    for budget in args.budgets:
        for name, recipe in (("sparse", sparse), ("dense", dense)):
            runs = [run(recipe, budget, seed) for seed in range(1, args.seeds + 1)]
            losses = sorted(loss for _, _, loss in runs)
            steps, seconds = runs[0][0], statistics.median(s for _, s, _ in runs)
            spread = f"{statistics.median(losses):.4f} ({losses[0]:.4f}–{losses[-1]:.4f})"
            print(f"{budget:7.0f}s {name:8} {steps:7} {seconds:8.1f} {spread:>34}", flush=True)


def run(recipe: Recipe, budget: float, seed: int) -> tuple[int, float, float]:
    """Train for about ``budget`` seconds; steps, seconds by the run's own clock, held-out loss."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe.model_copy(update={"seed": seed, "out": str(Path(folder) / "run")})
        cost = measure(build_session(recipe, lambda text: None), repeats=15)
        steps = max(1, int((budget - cost.eval_seconds) / cost.step_seconds))
        evaluation = recipe.eval.model_copy(update={"every": steps, "sample": 0})
        training = recipe.train.model_copy(update={"steps": steps})
        path = train(
            recipe.model_copy(update={"train": training, "eval": evaluation}), console=Console(quiet=True)
        )
        last = read_rows(path / "metrics.jsonl")[-1]
        return steps, last["time"], last["loss"]


if __name__ == "__main__":
    main()
