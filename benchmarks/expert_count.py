"""What a sparse layer costs against its number of experts, at equal active size; a table and a picture.

8 experts of 256 are active out of 8, 64, 512 and 4,096, width 512, float32: decoding one token, 256 tokens
forward, and 256 tokens forward and backward. The router's own cost grows with the experts by definition, so
it is timed beside the layer; so does a gradient that has a place for every expert.

    python benchmarks/expert_count.py --out docs/expert-count.png
"""

import argparse

import torch
from timing import header, median_seconds

from moesaic.machine import keep_freed_memory
from moesaic.model.experts import ExpertOptions
from moesaic.model.moe import MoE
from moesaic.model.routers import TopKOptions

COUNTS, WIDTH, HIDDEN, TOP_K, TOKENS = (8, 64, 512, 4096), 512, 256, 8, 256


def costs(count: int) -> dict[str, float]:
    """Milliseconds of each kind of work with ``count`` experts."""
    torch.manual_seed(0)
    layer = MoE(TopKOptions(top_k=TOP_K), ExpertOptions(count=count, hidden=HIDDEN), WIDTH)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02)
    one_TD, x_TD = torch.randn(1, WIDTH), torch.randn(TOKENS, WIDTH)

    def step() -> None:
        layer(x_TD)[0].sum().backward()
        layer.zero_grad()

    def inferred(x: torch.Tensor, module: torch.nn.Module) -> None:
        with torch.inference_mode():
            module(x)

    work = {
        "one token": lambda: inferred(one_TD, layer),
        "its router": lambda: inferred(one_TD, layer.gate),
        "256 tokens": lambda: inferred(x_TD, layer),
        "forward and backward": step,
    }
    return {name: 1000 * seconds for name, seconds in median_seconds(work, repeats=9, warmup=2).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="draw the table as a PNG")
    args = parser.parse_args()
    print(header())
    keep_freed_memory()
    table = {count: costs(count) for count in COUNTS}
    names = list(table[COUNTS[0]])
    print(f"\n{'experts':>8} " + " ".join(f"{name + ', ms':>24}" for name in names))
    for count, row in table.items():
        print(f"{count:8} " + " ".join(f"{row[name]:24.2f}" for name in names))
    if args.out:
        draw(table, names, args.out)


def draw(table: dict[int, dict[str, float]], names: list[str], out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name in names:
        axes.plot(list(table), [row[name] for row in table.values()], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="experts, 8 of them active", ylabel="milliseconds")
    axes.set_xticks(list(table), [f"{count:,}" for count in table])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.set_ylim(top=15_000)  # room for the legend
    axes.legend(frameon=False, ncols=2)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
