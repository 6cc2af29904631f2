"""AdamW for experts that are mostly idle, as if they had been updated at every step.

An expert without gradient still moves under dense AdamW: its momentum goes on pushing, its weights decay. For
one that skipped the steps s+1 … t-1 all of that is one multiplication and one addition, so that it can be
made up for when the expert is next used (the derivation is in docs/offload.md):

    p <- A p - sum of B_i m / (sqrt(v) + eps_i),   m <- b1^n m,   v <- b2^n v,   n = t - 1 - s

with scalars that depend on the learning rates in between alone. Only epsilon keeps the sum from being one
term: as v fades beside it, it weighs more from step to step. Three terms stand for all of them
(``_few_terms``); what that leaves of a difference is measured in tests/test_sparse_optimizer.py."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesaic.native.adamw import Scalars

_NEGLIGIBLE = 1e-12  # what is left of a push that is not added any more
_TERMS = 3  # within 5e-5 of the sum over any idle time, at 0.9 and 0.95 as at 0.9 and 0.999
_MOST_RATIO = 0.95  # of b1^2 to b2: pushes fade by its root from step to step, to 4e-12 in 1,023


def check_betas(beta1: float, beta2: float) -> None:
    """Raise ValueError for constants under which the push of an old gradient does not fade."""
    if beta1**2 > _MOST_RATIO * beta2:
        raise ValueError(
            f"betas {beta1} and {beta2}: what an idle expert missed can only be made up for where the square "
            f"of the first is at most {_MOST_RATIO} of the second, as in 0.9 and 0.95"
        )


@dataclass(frozen=True)
class AdamW:
    """The constants of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class CatchUp(NamedTuple):
    """What an expert that skipped steps is multiplied by and pushed by."""

    keep: float  # A
    pushes: list[tuple[float, float]]  # B and epsilon of each term
    first: float  # b1^n
    second: float  # b2^n


class History:
    """The learning rate of every step so far, steps counted from 1."""

    def __init__(self, constants: AdamW, rates: list[float] | None = None) -> None:
        self.constants = constants
        self.rates: list[float] = []
        self._since: dict[int, CatchUp] = {}  # by stamp, until the next step
        self._log_keep = [0.0]  # sums of log(1 - rate · weight decay)
        for rate in rates or []:
            self.add(rate)

    @property
    def step(self) -> int:
        """The last step that is known."""
        return len(self.rates)

    def add(self, rate: float) -> None:
        """The rate of the next step. Raises ValueError for one at which the decay alone would turn weights
        around."""
        if not 0 <= rate * self.constants.weight_decay < 1:
            raise ValueError(f"a learning rate of {rate} with this weight decay keeps nothing of a weight")
        self._since.clear()
        self.rates.append(rate)
        self._log_keep.append(self._log_keep[-1] + math.log1p(-rate * self.constants.weight_decay))

    def since(self, stamp: int) -> CatchUp:
        """What brings an expert that was last updated at step ``stamp`` (0: never) to the last step."""
        if stamp not in self._since:
            self._since[stamp] = self._made_up(stamp)
        return self._since[stamp]

    def _made_up(self, stamp: int) -> CatchUp:
        c, last = self.constants, self.step
        skipped = last - stamp
        keep = math.exp(self._log_keep[last] - self._log_keep[stamp])
        ratio = c.beta1 / math.sqrt(c.beta2)
        lasting = skipped if not ratio else min(skipped, int(math.log(_NEGLIGIBLE) / math.log(ratio)))
        if not ratio or not lasting:
            return CatchUp(keep, [], c.beta1**skipped, c.beta2**skipped)
        n = np.arange(1, lasting + 1)
        j = stamp + n
        scale = np.sqrt(1 - c.beta2**j) / (1 - c.beta1**j)
        rates = np.array(self.rates[stamp : stamp + lasting])
        after = np.exp(self._log_keep[last] - np.array(self._log_keep[stamp + 1 : stamp + 1 + lasting]))
        push = rates * scale * ratio**n * after
        eps = c.eps * np.sqrt((1 - c.beta2**j) / np.maximum(c.beta2**n, 1e-300))
        return CatchUp(keep, _few_terms(push, eps), c.beta1**skipped, c.beta2**skipped)

    def decay_since(self, stamp: int) -> CatchUp:
        """The decay of the weights alone, as lazy AdamW makes up for it."""
        return CatchUp(math.exp(self._log_keep[self.step] - self._log_keep[stamp]), [], 1.0, 1.0)


def _few_terms(push: NDArray[np.float64], eps: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Few terms whose sum of B / (r + epsilon) is nearly that of all, for every r from 0 on.

    Gauss's quadrature of the weights B over u = e / (e + epsilon), e the first epsilon: in u the summand is
    smooth, in epsilon, which grows a hundredfold, it is not. Nodes and weights by Lanczos' iteration and the
    eigenvalues of its matrix (Golub and Welsch 1969)."""
    push, eps = push[push > 0], eps[push > 0]
    if len(push) <= _TERMS:
        return list(zip(push.tolist(), eps.tolist(), strict=True))
    first, total = eps[0], push.sum()
    u = first / (first + eps)
    basis, diagonal, beside = [np.sqrt(push / total)], [], []
    while True:
        rest = u * basis[-1]
        diagonal.append(rest @ basis[-1])
        for vector in [*basis, *basis]:  # twice, to be orthogonal to the last digit
            rest = rest - (rest @ vector) * vector
        norm = np.linalg.norm(rest)
        if len(basis) == _TERMS or norm < 1e-12:  # epsilons that are all alike need no more
            break
        beside.append(norm)
        basis.append(rest / norm)
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    weights, places = total * vectors[0] ** 2, first * (1 / nodes - 1)
    return list(zip(weights.tolist(), places.tolist(), strict=True))


def scalars_of(by: CatchUp) -> Scalars:
    """To catch up, and no step."""
    return Scalars(by.keep, by.first, by.second, by.pushes)


def scalars_of_step(
    by: CatchUp, constants: AdamW, rate: float, count: int, scale: float = 1.0, seed: int = 0
) -> Scalars:
    """To catch up, and then to make step number ``count`` (from 1) with ``scale`` times the gradient;
    ``seed`` is that of the rounding of weights in bfloat16."""
    c = constants
    return Scalars(
        *(by.keep, by.first, by.second, by.pushes),
        decay=1 - rate * c.weight_decay,
        beta1=c.beta1,
        beta2=c.beta2,
        eps=c.eps,
        rate=rate / (1 - c.beta1**count),
        root=math.sqrt(1 - c.beta2**count),
        scale=scale,
        seed=seed,
    )
