"""Eight roles merged, against everything else that could be made of them, on held-out data.

    python benchmarks/merge_roles.py ../shared/data/experts --seeds 1 2 3

A small base of Llama's shape is trained on all roles, an expert of each role from it, tuned in everything or
in its feed-forward networks alone. Printed for each seed: loss by role, the mean, its difference from the
base with a 95 % interval of the paired bootstrap, and a verdict; at the end the share of the gap from base to
oracle that is closed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from rich.console import Console
from timing import header

from moesaic.train.merge_chain import Chain
from moesaic.train.merge_proof import Models, dense_rivals, prove, rivals


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
    dense: Models = {}
    for seed in args.seeds:
        for networks_only in (False, True):
            started = time.perf_counter()
            chain = Chain(args.out / str(seed), roles, seed=seed, networks_only=networks_only)
            parts = chain.make_parts(_say)
            ours = chain.stages(parts, _say)
            steps = chain.expert_steps + chain.router_steps + chain.shared_steps
            others, missing = rivals(parts, chain.router_steps, chain.lr, _say)
            if not networks_only:  # the same for both
                dense, _ = dense_rivals(parts, 2, steps, chain.lr, _say)
            proof = prove(parts, {**others, **dense}, ours, missing, _say)
            took = time.perf_counter() - started
            console.print(f"\nseed {seed}, experts tuned in: {chain.kind} ({took:.0f} s)", style="bold")
            for table in proof.tables(180):
                console.print(table)
            for sentence in proof.sentences():
                console.print(sentence)
            (parts.root / "proof.json").write_text(json.dumps(proof.as_json(), indent=1))
            for name, share in proof.closed.items():
                closed.setdefault(f"{chain.kind}: {name}", []).append(share or 0.0)
    print("\nshare of the gap from base to oracle that is closed, seed by seed")
    for name, shares in closed.items():
        said = ", ".join(f"{share:.2f}" for share in shares)
        print(f"{name:36} {said}  (median {statistics.median(shares):.2f})")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
