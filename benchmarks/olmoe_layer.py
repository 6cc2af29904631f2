"""The expert layer of OLMoE, forward and backward: ours, transformers' grouped_mm, and the machine's limit.

The limit R is the rate of a 2048³ product in the same run; a layer's floating-point work is that of its
experts, three times forward. Each contestant's peak memory is measured in a process of its own.

    python benchmarks/olmoe_layer.py                    # on CPU: the rows of docs/evidence.md
    python benchmarks/olmoe_layer.py --device cuda      # OLMoE's and Qwen3-30B's shapes at 32k tokens
    python benchmarks/olmoe_layer.py --tokens 512 --dtypes bfloat16 --repeats 5
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from timing import header, median_seconds

from moesaic.machine import keep_freed_memory, matmul_rate
from moesaic.model.experts import ExpertOptions
from moesaic.model.moe import MoE
from moesaic.model.routers import TopKOptions

SHAPES = {"olmoe": (2048, 1024, 64, 8), "qwen3-30b": (2048, 768, 128, 8)}


def ours(shape: tuple[int, int, int, int]) -> torch.nn.Module:
    width, hidden, experts, top_k = shape
    layer = MoE(TopKOptions(top_k=top_k), ExpertOptions(count=experts, hidden=hidden), width)
    return layer.train()


def theirs(shape: tuple[int, int, int, int], kind: str) -> torch.nn.Module:
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    width, hidden, experts, top_k = shape
    config = OlmoeConfig(
        hidden_size=width, intermediate_size=hidden, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = kind
    return OlmoeSparseMoeBlock(config).train()


def contestant(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, tokens: int
) -> Callable[[], None]:
    """One forward and backward pass of the layer called ``name``, all weights alike."""
    torch.set_default_dtype(dtype)  # so that no float32 copy ever stands in memory
    with torch.device(device):
        layer = ours(shape) if name == "moesaic" else theirs(shape, name)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    x_TD = torch.randn(tokens, shape[0], device=device, generator=generator).to(dtype)
    dy_TD = torch.randn(tokens, shape[0], device=device, generator=generator).to(dtype)

    def step() -> None:
        x = x_TD.requires_grad_()
        out = layer(x) if name == "moesaic" else layer(x[None])
        out = out[0] if isinstance(out, tuple) else out
        out.reshape(dy_TD.shape).backward(dy_TD)
        x.grad = None
        layer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def peak_bytes(name: str, args: argparse.Namespace, shape: str, dtype: str, tokens: int) -> int:
    """What one pass takes beyond the layer itself and its gradients, in a process of its own."""
    words = [sys.executable, __file__, "--peak", name, "--shapes", shape, "--dtypes", dtype]
    run = subprocess.run(
        [*words, "--tokens", str(tokens), "--device", args.device], capture_output=True, text=True, check=True
    )
    return int(run.stdout.split()[-1])


def measure_peak(name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str, T: int) -> int:
    """Largest memory during one pass, less what stood before it."""
    if device == "cuda":
        step = contestant(name, shape, dtype, device, T)
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    step = contestant(name, shape, dtype, device, T)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak starts again from here
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--dtypes", nargs="+", default=None)
    parser.add_argument("--tokens", type=int, nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", nargs="+", default=["grouped_mm"], help="also eager, batched_mm")
    parser.add_argument("--peak", help="measure one contestant's memory and print it (internal)")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    shapes = args.shapes or (["olmoe", "qwen3-30b"] if cuda else ["olmoe"])
    tokens = args.tokens or ([32_768] if cuda else [512, 2048])
    dtypes = args.dtypes or (["bfloat16"] if cuda else ["bfloat16", "float32"])
    if args.peak:
        print(measure_peak(args.peak, SHAPES[shapes[0]], getattr(torch, dtypes[0]), args.device, tokens[0]))
        return
    print(header() if not cuda else torch.cuda.get_device_name(), flush=True)
    keep_freed_memory()
    names = ["moesaic", *args.peers]
    head = f"{'layer':10} {'dtype':9} {'tokens':>6} {'contestant':11}"
    print(f"\n{head} {'ms':>9} {'of R':>6} {'×':>6} {'peak MB':>8}")
    for shape in shapes:
        width, hidden, _, top_k = SHAPES[shape]
        for dtype in dtypes:
            rate = matmul_rate(getattr(torch, dtype), device=args.device)
            for T in tokens:
                work = 3 * 2 * 3 * T * top_k * width * hidden
                build = {
                    n: contestant(n, SHAPES[shape], getattr(torch, dtype), args.device, T) for n in names
                }
                seconds = median_seconds(build, args.repeats, 1 if not cuda else 3)
                del build
                for name in names:
                    peak = peak_bytes(name, args, shape, dtype, T) / 1e6
                    reached, ratio = work / seconds[name] / rate, seconds[name] / seconds["moesaic"]
                    row = f"{shape:10} {dtype:9} {T:6} {name:11} {1000 * seconds[name]:9.1f}"
                    print(f"{row} {reached:6.2f} {ratio:6.2f} {peak:8.0f}", flush=True)


if __name__ == "__main__":
    main()
