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
from moesaic.train.merge_chain import BASE, ORACLE, OURS, SOUP, Chain, prove


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder with one JSONL file for each role")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/merge-roles"))
    parser.add_argument("--networks-only", action="store_true")
    args = parser.parse_args()
    print(header(), flush=True)
    roles = {file.stem: file for file in sorted(args.data.glob("*.jsonl"))}
    kind = "networks" if args.networks_only else "whole"
    closed: dict[str, list[float]] = {}
    console = Console(width=220)
    for seed in args.seeds:
        started = time.perf_counter()
        chain = Chain(args.out / f"{kind}-{seed}", roles, seed=seed, networks_only=args.networks_only)
        made = chain.run(_say)
        first, layers = next(iter(roles)), 4
        smol = chain.merged("smol-merge", _say, shared=f"expert:{first}", router={"init": "random"})
        balance = [f"loss.balance={0.01 * layers}", "data.join=0", "optim.lr=1e-3"]
        models = {
            BASE: made[BASE],
            **{role: made[role] for role in roles},
            SOUP: chain.soup(_say),
            "random router": chain.merged("random", _say, router={"init": "random"}),
            "mergekit's hidden router": chain.merged("hidden", _say, router={"init": "prompts"}),
            "SmolMoE's recipe": chain.stage("smol", "router", smol, chain.router_steps, _say, balance),
            "ridge router": made["merge"],
            "ridge + router": made["merge + router"],
            OURS: made[OURS],
        }
        data = [f"optim.lr={chain.lr}", "train.only=[]", "data.join=0.5"]
        steps = chain.expert_steps + chain.router_steps + chain.shared_steps
        models["dense, all data, as many steps as ours saw"] = chain.stage(
            "dense", "expert", made[BASE], steps, _say, data
        )
        comparison, changing = prove(chain, models, _say)
        console.print(f"\nseed {seed}, {kind} experts, {time.perf_counter() - started:.0f} s", style="bold")
        console.print(comparison.table())
        console.print(changing.table())
        rivals = [BASE, SOUP, "random router", "mergekit's hidden router", "SmolMoE's recipe", *roles]
        for sentence in (*verdict(comparison, OURS, rivals, ORACLE), *verdict(changing, OURS, [BASE])):
            console.print(sentence)
        for name in ("ridge router", "ridge + router", OURS):
            closed.setdefault(name, []).append(gap_closed(comparison, name, ORACLE))
    print("\nshare of the gap from base to oracle that is closed, seed by seed")
    for name, shares in closed.items():
        said = ", ".join(f"{share:.2f}" for share in shares)
        print(f"{name:28} {said}  (median {statistics.median(shares):.2f})")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
