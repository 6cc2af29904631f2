"""The compiled kernels against loops over rows, and what happens where they cannot be had.

Shape legend: T tokens, R rows, E experts, K choices, O outputs, I inputs.
"""

import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from router_oracles import randomise
from torch import Tensor

from moesaic.model import dispatch as by_torch
from moesaic.model.dispatch import rows_of, sort_by_expert
from moesaic.model.experts import ExpertOptions, FFNKind
from moesaic.model.moe import MoE
from moesaic.model.norm import RMSNorm
from moesaic.model.routers import SmartOptions, TopKOptions
from moesaic.native import library
from moesaic.native.checksum import crc32
from moesaic.native.grams import squared_norms
from moesaic.native.rows import Stack, outer_products, products, transposed_products
from moesaic.routing import Routing

kernels = pytest.mark.skipif(not library.available(), reason=library.state())
COUNTS = [[1, 0, 2, 3], [0, 0, 1, 0], [4, 5, 9, 1], [2, 2, 2, 2]]
SHAPES = [(1, 1), (3, 37), (16, 64), (130, 200)]
FLOATS = [torch.float32, torch.bfloat16]


def owners(counts_E: list[int]) -> list[int]:
    return [e for e, count in enumerate(counts_E) for _ in range(count)]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@kernels
@pytest.mark.parametrize("counts_E", COUNTS, ids=str)
@pytest.mark.parametrize(("O", "I"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_each_row(
    counts_E: list[int], O: int, I: int, dtype: torch.dtype, bias: bool
) -> None:
    stack_EOI, x_RI = numbers(4, O, I).to(dtype), numbers(sum(counts_E), I, seed=1).to(dtype)
    bias_EO = numbers(4, O, seed=2).to(dtype) if bias else None
    told = products(x_RI, Stack(stack_EOI, bias_EO), rows_of(counts_E))
    expected = [stack_EOI[e].double() @ x.double() for e, x in zip(owners(counts_E), x_RI, strict=True)]
    if bias_EO is not None:
        expected = [y + bias_EO[e].double() for y, e in zip(expected, owners(counts_E), strict=True)]
    assert told.dtype == torch.float32
    torch.testing.assert_close(told.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)


@kernels
@pytest.mark.parametrize("counts_E", COUNTS, ids=str)
@pytest.mark.parametrize(("O", "I"), SHAPES)
def test_products_with_int8_are_those_with_its_steps(counts_E: list[int], O: int, I: int) -> None:
    steps_EOI = torch.randint(-127, 128, (4, O, I), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale_EO, bias_EO, x_RI = numbers(4, O, seed=1), numbers(4, O, seed=2), numbers(sum(counts_E), I, seed=3)
    told = products(x_RI, Stack(steps_EOI, bias_EO, scale_EO), rows_of(counts_E))
    stack_EOI = steps_EOI.double() * scale_EO[..., None].double()
    expected = [stack_EOI[e] @ x.double() + bias_EO[e] for e, x in zip(owners(counts_E), x_RI, strict=True)]
    torch.testing.assert_close(told.double(), torch.stack(expected), rtol=1e-5, atol=1e-2)


@kernels
@pytest.mark.parametrize("counts_E", COUNTS, ids=str)
@pytest.mark.parametrize(("O", "I"), [*SHAPES, (20, 1100)])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("threads", [1, 2])
def test_products_from_the_other_side_and_gradients(
    counts_E: list[int], O: int, I: int, dtype: torch.dtype, threads: int
) -> None:
    stack_EOI, dy_RO, x_RI = (
        numbers(4, O, I).to(dtype),
        numbers(sum(counts_E), O, seed=1),
        numbers(sum(counts_E), I, seed=2),
    )
    grad_EOI = torch.full((4, O, I), torch.nan, dtype=dtype)
    torch.set_num_threads(threads)
    try:
        told = transposed_products(dy_RO, stack_EOI, rows_of(counts_E))
        outer_products(dy_RO, x_RI, grad_EOI, list(accumulate(counts_E)))
    finally:
        torch.set_num_threads(1)
    expected = [dy.double() @ stack_EOI[e].double() for e, dy in zip(owners(counts_E), dy_RO, strict=True)]
    torch.testing.assert_close(told.double(), torch.stack(expected), rtol=1e-5, atol=1e-4)
    sums_EOI = torch.zeros(4, O, I, dtype=torch.float64)
    for e, dy, x in zip(owners(counts_E), dy_RO.double(), x_RI.double(), strict=True):
        sums_EOI[e] += torch.outer(dy, x)
    # Rounded once: bfloat16 has 8 bits.
    tolerance = {"rtol": 2**-8, "atol": 1e-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grad_EOI.double(), sums_EOI, **tolerance)


@kernels
def test_gradients_in_bf16_round_to_even_and_keep_what_is_not_finite() -> None:
    values = torch.tensor(
        [1.00390625, 1.01171875, -1.00390625, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40]
    )
    grad = torch.empty(1, 1, 8, dtype=torch.bfloat16)
    outer_products(torch.ones(1, 1), values[None], grad, [1])
    assert torch.equal(grad.flatten().nan_to_num(7.0), values.bfloat16().nan_to_num(7.0))


@kernels
@pytest.mark.parametrize("kind", ["swiglu", "relu", "gelu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_layer_without_gradients_is_the_layer_with_them(
    kind: FFNKind, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two to four experts per token; the second pass through PyTorch alone."""
    made = MoE(SmartOptions(top_k=4), ExpertOptions(kind=kind, hidden=24, bias=True, count=9), 16).eval()
    randomise(made, seed=3)
    made.experts.to(dtype)
    x_TD = numbers(tokens, 16).to(dtype)
    real_T = torch.tensor([True] * (tokens - 1) + [tokens == 1])
    with torch.no_grad():
        told, _ = made(x_TD, real_T)
    monkeypatch.setattr(library, "available", lambda: False)
    expected, routing = made(x_TD, real_T)
    assert tokens == 1 or not routing.keep_TK[-1].any()
    assert told.dtype == expected.dtype
    error = (told.float() - expected.detach().float()).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 0.01)


@kernels
@pytest.mark.parametrize("fill", [None, lambda counts, _: [4 * -(-c // 4) for c in counts]])
def test_counting_sorts_as_sorting_does(
    fill: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for T, K, E in ((1, 1, 1), (7, 2, 3), (50, 4, 9), (3, 2, 64)):
        logits_TE = torch.randn(T, E, generator=generator)
        weight_TK, expert_TK = logits_TE.softmax(-1).topk(min(K, E))
        for share in (1.0, 0.6, 0.0):
            keep_TK = torch.rand(weight_TK.shape, generator=generator) < share
            routing = Routing(weight_TK, expert_TK, keep_TK, logits_TE, logits_TE, keep_TK)
            told = sort_by_expert(routing, fill)
            with monkeypatch.context() as patch:
                patch.setattr(library, "available", lambda: False)
                expected = sort_by_expert(routing, fill)
            assert told.counts_E == expected.counts_E
            assert told.complete == expected.complete
            for name in ("order_R", "token_R", "place_TK"):
                assert torch.equal(getattr(told, name), getattr(expected, name)), name


def test_the_sort_for_gpus_is_stable_and_leaves_room_for_fillers() -> None:
    expert_TK, keep_TK = (
        torch.tensor([[1, 0], [1, 2], [0, 1]]),
        torch.tensor([[True, True], [True, False], [True, True]]),
    )
    order_R, token_R, place_TK = by_torch._place(expert_TK, keep_TK, [0, 4, 8], 8)
    assert order_R.tolist() == [1, 4, 6, 6, 0, 2, 5, 6]
    assert token_R.tolist() == [0, 2, 2, 2, 0, 1, 2, 2]
    assert place_TK.tolist() == [[4, 0], [5, 8], [1, 6]]


def test_many_small_experts_train_the_same_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        made = MoE(TopKOptions(top_k=3), ExpertOptions(hidden=12, count=40), 10).train()
        randomise(made, seed=5)
        x_TD = numbers(20, 10).requires_grad_()
        y_TD, _ = made(x_TD)
        torch.autograd.backward(y_TD.square().sum())
        return [y_TD, x_TD.grad, *(p.grad for p in made.parameters())]

    told = run()
    monkeypatch.setattr(library, "available", lambda: False)
    for ours, theirs in zip(told, run(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


SAY = "from moesaic.native import library; print(library.state())"


def state(home: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("CXX", library.SWITCH)}
    surroundings = kept | {"XDG_CACHE_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=surroundings, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.strip()


def compiler(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_kernels_it_says_why(tmp_path: Path) -> None:
    broken = compiler(tmp_path / "broken", "echo 'no such flag' >&2; exit 1")
    assert state(tmp_path, **{library.SWITCH: "0"}) == "PyTorch (MOESAIC_NATIVE=0)"
    assert state(tmp_path, PATH=str(tmp_path)) == "PyTorch (no C++ compiler)"
    assert state(tmp_path, CXX=broken) == "PyTorch (broken: no such flag)"
    silent = compiler(tmp_path / "silent", "exit 0")
    assert state(tmp_path, CXX=silent).startswith("PyTorch (")
    assert list((tmp_path / "moesaic" / "kernels").iterdir()) == []


@kernels
def test_kernels_are_compiled_once_and_never_loaded_from_where_others_write(tmp_path: Path) -> None:
    assert state(tmp_path) == "compiled kernels"
    (kept,) = (tmp_path / "moesaic" / "kernels").iterdir()
    made = kept.stat().st_mtime_ns
    assert state(tmp_path) == "compiled kernels"
    assert kept.stat().st_mtime_ns == made
    kept.write_bytes(b"not a library")
    assert state(tmp_path).startswith("PyTorch (")
    kept.parent.chmod(0o777)
    assert state(tmp_path) == "compiled kernels"  # from a folder of its own
    assert kept.read_bytes() == b"not a library"


@kernels
@pytest.mark.parametrize("shape", [(2, 3), (3, 5, 37), (300, 64), (1, 40, 2048)], ids=str)
@pytest.mark.parametrize(("given", "autocast"), [(FLOATS[0], False), (FLOATS[0], True), (FLOATS[1], True)])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_norm_and_its_gradients_are_those_of_its_formula(
    shape: tuple[int, ...], given: torch.dtype, autocast: bool, threads: int
) -> None:
    wanted = torch.bfloat16 if autocast else given
    x, dy = numbers(*shape).to(given).requires_grad_(), numbers(*shape, seed=2).to(wanted)
    norm = RMSNorm(shape[-1], eps=1e-3)
    norm.weight.data = numbers(shape[-1], seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = norm(x)
        y.backward(dy)
    finally:
        torch.set_num_threads(before)
    exact, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    expected.backward(dy.double())
    near = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert (y.dtype, x.grad.dtype) == (wanted, given)
    for told, wish in ((y, expected), (x.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert wish is not None
        error = (told.double() - wish).abs().max() / wish.abs().max()
        assert error < near[told.dtype]


@kernels
@pytest.mark.parametrize("counts_E", [*COUNTS, [40, 0, 7]], ids=str)
@pytest.mark.parametrize(("I", "J"), SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_squared_norms_are_those_of_the_products(
    counts_E: list[int], I: int, J: int, dtype: torch.dtype
) -> None:
    left, right = numbers(sum(counts_E), I).to(dtype), numbers(sum(counts_E), J, seed=1).to(dtype)
    parts = zip(left.double().split(counts_E), right.double().split(counts_E), strict=True)
    expected = sum(float((one.T @ other).square().sum()) for one, other in parts)
    assert squared_norms(left, right, list(accumulate(counts_E))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 79, 80, 127, 128, 4096, 100_003])
def test_checksums_are_those_of_zlib(size: int) -> None:
    data = numbers(size + 3).mul(100).to(torch.uint8).numpy().tobytes()
    for start in (0, 3):  # aligned and not
        assert crc32(memoryview(data)[start : start + size]) == zlib.crc32(data[start : start + size])


@kernels
def test_threads_that_read_have_no_teams_of_threads() -> None:
    code = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from moesaic.native.threads import compute_alone
torch.ones(2**22).add_(1)
before, known = len(os.listdir("/proc/self/task")), torch.get_num_threads()
with ThreadPoolExecutor(1, initializer=compute_alone) as threads:
    threads.submit(torch.ones(2**22).add_, 1).result()
    print(len(os.listdir("/proc/self/task")) - before, torch.get_num_threads() == known)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["1", "True"], done.stderr
