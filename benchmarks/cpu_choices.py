"""What each CPU choice in model/ buys over what PyTorch would do by itself, forward and backward."""

import random
from unittest import mock

import torch
import torch.nn.functional as F
from timing import header, median_seconds

from moesaic.model.attention import _plain_attention
from moesaic.model.conv import ShortConv
from moesaic.model.dispatch import Dispatch, sort_by_expert
from moesaic.model.experts import ExpertOptions, Experts
from moesaic.model.norm import RMSNorm
from moesaic.native import library
from moesaic.routing import Routing

T, D, E, K = 4096, 256, 8, 2


def main() -> None:
    print(header())
    torch.manual_seed(0)
    print(f"\n{'choice':58} {'PyTorch ms':>11} {'moesaic ms':>11} {'×':>6}")
    for name, theirs, ours in (
        norm(),
        attention(),
        conv(),
        scatter(),
        shapes(),
        equal(),
        few(),
        sort(),
        onednn(),
    ):
        seconds = median_seconds({"theirs": theirs, "ours": ours}, repeats=11)
        a, b = 1000 * seconds["theirs"], 1000 * seconds["ours"]
        print(f"{name:58} {a:11.2f} {b:11.2f} {a / b:6.2f}")


def norm():
    """RMSNorm as one autograd node against PyTorch's composed one."""
    x = torch.randn(T, D, requires_grad=True)
    layer = RMSNorm(D, 1e-5)
    weight = torch.ones(D, requires_grad=True)

    def theirs() -> None:
        F.rms_norm(x, (D,), weight, 1e-5).sum().backward()

    return f"RMS norm, fp32 [{T}, {D}]", theirs, lambda: layer(x).sum().backward()


def attention():
    """Attention by plain products in bf16 against the flash kernel."""
    q, k, v = (torch.randn(32, 4, 128, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def theirs() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    def ours() -> None:
        _plain_attention(q, k, v, None, 64**-0.5, 0.0).sum().backward()

    return "attention, bf16 [32, 4, 128, 64]", theirs, ours


def conv():
    """The short convolution as one node against depthwise conv1d."""
    x = torch.randn(8, 256, D, requires_grad=True)
    ours = ShortConv(4, D)
    weight = torch.zeros(D, 1, 4, requires_grad=True)

    def theirs() -> None:
        padded = F.pad(x.transpose(1, 2), (3, 0))
        (x + F.conv1d(padded, weight, groups=D).transpose(1, 2)).sum().backward()

    return f"short convolution, fp32 [8, 256, {D}]", theirs, lambda: ours(x, None, None).sum().backward()


def scatter():
    """Rows back to tokens: one bag of embeddings against index_add."""
    rows = torch.randn(T * K, D)
    logits = torch.randn(T, E)
    weight, expert = logits.softmax(-1).topk(K)
    keep = torch.ones_like(expert, dtype=torch.bool)
    dispatch = sort_by_expert(Routing(weight, expert, keep, logits, logits, keep))

    def theirs() -> None:
        torch.zeros(T, D).index_add(0, dispatch.token_R, rows)

    return f"combine, fp32, {T} tokens, top-{K}", theirs, lambda: dispatch.combine(rows)


def sorted_rows(counts: list[int]) -> Dispatch:
    order = torch.arange(sum(counts))
    return Dispatch(order, order, order[:, None], counts)


def run_bank(bank: Experts, counts: list[int], width: int) -> None:
    x = torch.randn(sum(counts), width, requires_grad=True)
    bank(x, torch.ones(len(x), 1), sorted_rows(counts)).sum().backward()


def shapes():
    """A bank in bf16 with ever new row counts, against row counts filled up to multiples of 64."""
    bank = Experts(ExpertOptions(kind="relu2", hidden=384, count=E), D)
    torch.nn.init.normal_(bank.up_proj, std=0.02)
    torch.nn.init.normal_(bank.down_proj, std=0.02)
    draw = random.Random(0)
    drawn = [[draw.randint(700, 1300) for _ in range(E)] for _ in range(100)]
    turn = {1: 0, 64: 0}

    def run(multiple: int) -> None:
        counts = [-(-count // multiple) * multiple for count in drawn[turn[multiple]]]
        turn[multiple] += 1
        with torch.autocast("cpu", torch.bfloat16):
            run_bank(bank, counts, D)

    return f"{E} experts, bf16, row counts as they come / in 64s", lambda: run(1), lambda: run(64)


def equal():
    """64 small experts with equal counts, which make one batched product, against counts one row apart."""
    bank = Experts(ExpertOptions(kind="swiglu", hidden=64, count=64), 128)
    torch.nn.init.normal_(bank.gate_up_proj, std=0.02)
    torch.nn.init.normal_(bank.down_proj, std=0.02)

    return (
        "64 experts, fp32, 64 rows each: a loop / one product",
        lambda: run_bank(bank, [63, 65] * 32, 128),
        lambda: run_bank(bank, [64] * 64, 128),
    )


def few():
    """512 small experts with two rows each, which are one call of our kernels, against a product for each."""
    bank = Experts(ExpertOptions(kind="swiglu", hidden=256, count=512), 512)
    torch.nn.init.normal_(bank.gate_up_proj, std=0.02)
    torch.nn.init.normal_(bank.down_proj, std=0.02)

    def theirs() -> None:
        with mock.patch.object(library, "available", return_value=False):
            run_bank(bank, [1, 3] * 256, 512)

    return (
        "512 experts, fp32, 2 rows each: a loop / kernels",
        theirs,
        lambda: run_bank(bank, [1, 3] * 256, 512),
    )


def sort():
    """16,384 choices sorted by expert: PyTorch's stable sort against counting."""
    logits = torch.randn(2048, 64)
    weight, expert = logits.softmax(-1).topk(8)
    keep = torch.ones_like(expert, dtype=torch.bool)
    routing = Routing(weight, expert, keep, logits, logits, keep)

    def theirs() -> None:
        with mock.patch.object(library, "available", return_value=False):
            sort_by_expert(routing)

    return "2,048 tokens, top-8 of 64: sorting / counting", theirs, lambda: sort_by_expert(routing)


def onednn():
    """A large float32 product by MKL, which torch.mm calls, and by oneDNN."""
    x, weight = torch.randn(256, 2048), torch.randn(2048, 2048)

    def ours() -> None:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return "256 rows by 2048 x 2048, fp32: MKL / oneDNN", lambda: torch.mm(x, weight.t()), ours


if __name__ == "__main__":
    main()
