"""Timing for the benchmarks: medians of many, alternating between the contestants."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def median_seconds(
    contestants: Mapping[str, Callable[[], object]], repeats: int = 15, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each, taken in turns so that a slow minute of the machine hits all alike."""
    for run in contestants.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def header() -> str:
    """One line that says what machine and version the figures below were made on."""
    from moesaic.machine import describe, matmul_rate, read_bandwidth

    facts = describe()
    rates = ", ".join(
        f"{name} {matmul_rate(getattr(torch, name)) / 1e9:,.0f}" for name in ("float32", "bfloat16")
    )
    return (
        f"{facts['processor']}, {facts['threads']} threads, torch {facts['packages']['torch']}; "
        f"2048³ matmul in GFLOP/s: {rates}; reads {read_bandwidth() / 1e9:.0f} GB/s"
    )
