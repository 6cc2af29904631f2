"""What machine this is: versions, threads, memory, and its measured speed."""

import ctypes
import functools
import os
import platform
import statistics
import sys
import time
from contextlib import suppress
from typing import Any

import torch

from moesaic.native.library import state as few_rows_state


def describe() -> dict[str, Any]:
    """Versions and hardware, for env.json and ``moesaic env``; nothing secret, no user or host name."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in (
        "moesaic",
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "pydantic",
        "transformers",
        "mlflow",
    ):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "products_of_few_rows": few_rows_state(),
        "large_float32_products": "oneDNN" if prefers_onednn() else "MKL",
        "huge_pages": "asked for" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "not asked for",
        "packages": packages,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    memory = total_memory()
    if memory is not None:
        facts["memory_bytes"] = memory
    return facts


def matmul_rate(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> float:
    """Median of five products of two size³ matrices, in floating-point operations per second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.mm(a, b)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def read_bandwidth(size: int = 2**28, device: str = "cpu") -> float:
    """Median rate of summing ``size`` float32 numbers (1 GiB), in bytes per second."""
    data = torch.ones(size, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 4 * size / statistics.median(seconds)


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of giving it back to the kernel.

    Activations of every step are allocated and freed; without this each step pays for their pages
    again. Nothing happens on other C libraries. Called where training and inference begin.
    """
    _set_malloc(
        trim_threshold=2**31 - 1, top_pad=64 * 2**20, mmap_threshold=32 * 2**20
    )  # the most it accepts


def return_freed_memory() -> None:
    """Tell glibc to give back what is freed, in pieces of a megabyte and more.

    Where tensors of many sizes come and go once, what is kept becomes holes: fitting the routers of eight
    models of SmolLM2-135M's shape held 3.0 GB at the end, and 1.5 with this.
    """
    _set_malloc(trim_threshold=16 * 2**20, top_pad=0, mmap_threshold=2**20)


def give_back_freed_memory() -> None:
    """Give the system what has been freed and kept (glibc's malloc_trim); nothing on other C libraries."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_malloc(trim_threshold: int, top_pad: int, mmap_threshold: int) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for number, value in ((-1, trim_threshold), (-2, top_pad), (-3, mmap_threshold)):  # glibc's malloc.h
        mallopt(number, value)


def multiplies_bf16(device: str) -> bool:
    """Whether bfloat16 products run in hardware here. On other processors they are far slower than
    float32: AVX-512 without BF16, and every AVX2 laptop, convert each operand first."""
    if device != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def prefers_onednn() -> bool:
    """Whether large float32 products go to oneDNN instead of MKL, which knows AMD's processors less well:
    216 GFLOP/s against 186 on a Zen 4 (2048³, two cores; benchmarks/cpu_choices.py). By the maker's name and
    not by a measurement, so that a run gives the same bits every time."""
    return torch.backends.mkldnn.is_available() and "AuthenticAMD" in _cpuinfo("vendor_id")


def total_memory() -> int | None:
    """Bytes of main memory, or None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that can still be taken without swapping, or None where the system does not say."""
    if device != "cpu":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes (0 where the system does not say)."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    """A line of Linux's description of the processor, or nothing elsewhere."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(key):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
