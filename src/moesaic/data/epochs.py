"""Which examples a step takes: all of them once, in an order of their own, before any comes again."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_EPOCHS = 0xE90C  # so that no step draws the numbers that an epoch does


def order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of ``size`` examples in one epoch, counted from 0; a function of its arguments alone."""
    return _order(seed, epoch, size)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    found: NDArray[np.int64] = generator(seed, epoch).permutation(size)
    found.flags.writeable = False  # it is shared
    return found


def generator(seed: int, epoch: int) -> np.random.Generator:
    """The randomness of one epoch."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % 2**64, _EPOCHS, epoch])))


def taken(seed: int, step: int, batch_size: int, size: int) -> NDArray[np.int64]:
    """The examples of a step, counted from 1: the next ``batch_size`` of all epochs laid end to end."""
    places = batch_size * (max(step, 1) - 1) + np.arange(batch_size)
    parts = [order(seed, epoch, size)[within] for epoch, within in _by_epoch(places, size)]
    return np.concatenate(parts)


def _by_epoch(places: NDArray[np.int64], size: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
        yield epoch, places[places // size == epoch] - epoch * size
