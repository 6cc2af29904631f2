"""What the order of a curriculum is worth: arche-small taught in four orders by equal steps, several seeds.

Three questions. What was learnt of earlier domains for the first batch of a new one: its loss when its turn
comes, in the order of the file and in shuffled orders, beside the loss of the untrained model on that very
batch. Whether the order of the file is better than a shuffled one: the held-out loss of all at the end.
Whether dopamine's choice is: the same, beside every batch of all domains.

    python benchmarks/curriculum.py --out runs/curriculum --seeds 1 2 3 --stage 12

A run that is there already is taken as it is.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from moesaic.train.loop import train
from moesaic.train.recipe import Recipe, load_recipe
from moesaic.train.rundir import read_rows
from moesaic.train.session import build_session

ORDERS = ("fixed", "shuffled", "dopamine", "mixed")


def recipe_of(out: Path, order: str, seed: int, stage: int, domains: int) -> Recipe:
    """``stage`` steps of each domain, whatever its loss does, so that all orders make as many."""
    words = [f"out={out}", f"seed={seed}", f"train.steps={stage * domains}", f"curriculum.order={order}"]
    words += [f"curriculum.stage={stage}", f"curriculum.patience={stage}", f"curriculum.visit={stage}"]
    return load_recipe("arche-small", [*words, "checkpoint.every=100000"])


@torch.inference_mode()
def untrained(seed: int, stage: int, domains: int) -> dict[str, float]:
    """The loss of a new model on the first batch of each domain."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(Path(folder), "fixed", seed, stage, domains)
        session = build_session(recipe, lambda _: None, run=Path(folder))
        options = recipe.train
        for domain in session.store.domains:
            windows = session.store.batch(seed, 1, options.batch_size, options.seq_len, domain)
            session.curriculum.now = domain
            (batch,) = session.micro_batches(1)
            assert torch.equal(batch.ids_BT, windows.ids_BT)
            torch.manual_seed(seed)
            with session.precision():
                found[domain] = float(session.objective(session.model, batch).parts["main"])
        session.close()
    return found


def mean(values: list[float]) -> str:
    """With the standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):6.3f} ±{spread:5.3f}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--out", type=Path, default=Path("runs/curriculum"))
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    arguments.add_argument("--stage", type=int, default=12, help="steps of a domain")
    given = arguments.parse_args()
    domains = 14
    ends: dict[str, list[float]] = {}
    firsts: dict[str, list[list[float]]] = {"untrained": []}
    for seed in given.seeds:
        for order in given.orders:
            out = given.out / f"{order}-{seed}"
            if not (out / "model").is_dir():
                train(
                    recipe_of(out, order, seed, given.stage, domains), resume=(out / "recipe.toml").is_file()
                )
            rows = read_rows(out / "metrics.jsonl")
            ends.setdefault(order, []).append([row["loss"] for row in rows if row["split"] == "val"][-1])
            stages = [row for row in rows if row["split"] == "stage"]
            if order in ("fixed", "shuffled"):
                firsts.setdefault(order, []).append([row["first"] for row in stages])
        file = given.out / f"untrained-{seed}.json"
        if not file.exists():
            file.write_text(json.dumps(untrained(seed, given.stage, domains)))
        firsts["untrained"].append(list(json.loads(file.read_text()).values()))
    print(f"held-out loss of all domains after {given.stage * domains} steps, seeds {given.seeds}")
    for order, values in ends.items():
        print(f"  {order:10s} {mean(values)}")
    print("loss of the first batch of the n-th domain")
    names = [name for name in ("untrained", "fixed", "shuffled") if firsts.get(name)]
    print("   n  " + "  ".join(f"{name:14s}" for name in names))
    for n in range(domains):
        cells = [mean([row[n] for row in firsts[name]]) for name in names]
        print(f"  {n + 1:2d}  " + "  ".join(f"{cell:14s}" for cell in cells))


if __name__ == "__main__":
    main()
