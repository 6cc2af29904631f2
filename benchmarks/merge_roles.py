"""Eight roles merged, against everything else that could be made of them, on held-out data.

    python benchmarks/merge_roles.py ../shared/data/experts --seeds 1 2 3

A small base of Llama's shape is trained on all roles, an expert of each role from it, tuned in everything or
(with --networks-only) in its feed-forward networks alone. Printed for each seed: loss by role, the mean, its
difference from the base with a 95 % interval of the paired bootstrap, and a verdict; at the end the share of
the gap from base to oracle that is closed.

SmolMoE's own recipe is reconstructed, since its constants are not public: all that is shared comes from one
expert, the router is random, and the balance loss is summed over the layers.
"""

import argparse
import statistics
import time
from pathlib import Path

from rich.console import Console
from timing import header

from moesaic.analysis.compare import gap_closed, verdict
from moesaic.model.transformer import LanguageModel
from moesaic.train.merge_chain import BASE, ORACLE, OURS, SOUP, Chain, prove

RIDGE, ROUTER = "ridge router", "ridge + router"
DENSE = "dense, all data, as many steps"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder with one JSONL file for each role")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/merge-roles"))
    args = parser.parse_args()
    print(header(), flush=True)
    roles = {file.stem: file for file in sorted(args.data.glob("*.jsonl"))}
    closed: dict[str, list[float]] = {}
    console = Console(width=180)
    for seed in args.seeds:
        for networks_only in (False, True):
            started = time.perf_counter()
            chain = Chain(args.out / str(seed), roles, seed=seed, networks_only=networks_only)
            models = contestants(chain)
            comparison, changing = prove(chain, models, _say)
            took = time.perf_counter() - started
            console.print(f"\nseed {seed}, experts tuned in: {chain.kind} ({took:.0f} s)", style="bold")
            console.print(comparison.table())
            console.print(changing.table())
            rivals = [name for name in models if name not in (DENSE, RIDGE, ROUTER, OURS)]
            for sentence in (*verdict(comparison, OURS, rivals, ORACLE), *verdict(changing, OURS, [BASE])):
                console.print(sentence)
            for name in (RIDGE, ROUTER, OURS):
                closed.setdefault(f"{chain.kind}: {name}", []).append(gap_closed(comparison, name, ORACLE))
    print("\nshare of the gap from base to oracle that is closed, seed by seed")
    for name, shares in closed.items():
        said = ", ".join(f"{share:.2f}" for share in shares)
        print(f"{name:36} {said}  (median {statistics.median(shares):.2f})")


def contestants(chain: Chain) -> dict[str, Path | LanguageModel]:
    """Everything that can be made of the same parts, by name."""
    made, first = chain.run(_say), next(iter(chain.roles))
    models: dict[str, Path | LanguageModel] = {BASE: made[BASE]}
    models |= {role: made[role] for role in chain.roles}
    models[SOUP] = chain.soup(_say)
    models["random router"] = chain.merged("random", _say, router={"init": "random"})
    models["mergekit's hidden router"] = chain.merged("hidden", _say, router={"init": "prompts"})
    smol = chain.merged("smol-merge", _say, shared=f"expert:{first}", router={"init": "random"})
    settings = [f"loss.balance={0.01 * 4}", "data.join=0", "optim.lr=1e-3"]  # summed over the 4 layers
    name = f"{chain.kind}-smol"
    models["SmolMoE's recipe"] = chain.stage(name, "router", smol, chain.router_steps, _say, settings)
    models |= {RIDGE: made["merge"], ROUTER: made["merge + router"], OURS: made[OURS]}
    steps = chain.expert_steps + chain.router_steps + chain.shared_steps
    settings = [f"optim.lr={chain.lr}", "train.only=[]", "data.join=0.5"]
    models[DENSE] = chain.stage("dense", "expert", made[BASE], steps, _say, settings)
    return models


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
