"""Several models on the same held-out documents, with paired intervals, and what to conclude.

A document's loss is the mean over the tokens that are to be predicted; a domain's is the mean over its
tokens; the total is the mean over the domains, so that a large one does not drown the others. Intervals are
of the paired bootstrap (Efron 1979): documents are drawn anew, the same for both models.

Shape legend: N documents, C domains.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from moesaic.data.examples import Coded, ExampleStore, fits_in_half, join_examples, padded
from moesaic.losses import token_losses
from moesaic.model.transformer import LanguageModel

_DRAWS = 2000
_BATCH = 32

Losses = tuple[NDArray[np.float64], NDArray[np.float64]]  # of each document: summed loss, tokens


@dataclass(frozen=True)
class Documents:
    """Held-out documents: the coded texts, and the domain of each as a number [N]."""

    domains: list[str]
    coded: list[Coded]
    domain_N: NDArray[np.int64]


def held_out(store: ExampleStore) -> Documents:
    """What a store holds out, domain after domain."""
    coded = [example for shard in store.shards for example in shard.val]
    domain_N = [c for c, shard in enumerate(store.shards) for _ in shard.val]
    return Documents(store.domains, coded, np.array(domain_N, np.int64))


def switching(store: ExampleStore, seq_len: int, seed: int = 0, most: int = 256) -> Documents | None:
    """Documents that are half of one held-out text and half of one of another domain, both with something to
    predict; None where there are no two such domains."""
    documents, generator = held_out(store), np.random.default_rng(seed)
    fit = [n for n, coded in enumerate(documents.coded) if fits_in_half(coded, seq_len)]
    if len({int(documents.domain_N[n]) for n in fit}) < 2:
        return None
    rows: list[Coded] = []
    while len(rows) < most:
        a, b = (fit[n] for n in generator.integers(0, len(fit), 2))
        if documents.domain_N[a] != documents.domain_N[b]:
            rows.append(join_examples(documents.coded[a], documents.coded[b], seq_len))
    return Documents(["switch"], rows, np.zeros(len(rows), np.int64))


@torch.inference_mode()
def losses_of(model: LanguageModel, documents: Documents, seq_len: int) -> Losses:
    """Each document's summed loss in nats and its number of predicted tokens, [N] both."""
    model.eval()
    sums, counts = [], []
    order = sorted(range(len(documents.coded)), key=lambda n: len(documents.coded[n][0]))
    for start in range(0, len(order), _BATCH):
        part = [documents.coded[n] for n in order[start : start + _BATCH]]
        windows = padded(part, seq_len)
        target_BT = windows.target_BT
        hidden_BTD = model(windows.ids_BT, windows.real_BT, logits=False).hidden_BTD
        loss_N = token_losses(hidden_BTD.flatten(0, 1), model.lm_head, target_BT.flatten())
        loss_BT = loss_N.view_as(target_BT)
        sums.append(loss_BT.double().sum(1))
        counts.append((target_BT >= 0).double().sum(1))
    back = np.argsort(order)
    return torch.cat(sums).numpy()[back], torch.cat(counts).numpy()[back]


@dataclass(frozen=True)
class Row:
    """One model: loss by domain [C], their mean, and its difference from the reference with a 95 %
    interval."""

    name: str
    loss_C: NDArray[np.float64]
    loss: float
    difference: tuple[float, float, float]


class Comparison:
    """Losses of models on the same documents, all compared with a reference."""

    def __init__(
        self, documents: Documents, reference: str, losses: dict[str, Losses], seed: int = 0
    ) -> None:
        self.documents, self.reference, self.losses = documents, reference, losses
        generator = np.random.default_rng(seed)
        members = [np.flatnonzero(documents.domain_N == c) for c in range(len(documents.domains))]
        self._draws = [generator.choice(m, (_DRAWS, len(m))) for m in members]
        self._members = members

    def rows(self) -> list[Row]:
        """A row for every model, in the order in which they were given."""
        rows = []
        for name in self.losses:
            loss_C = np.array([self._mean(name, m) for m in self._members])
            rows.append(Row(name, loss_C, float(loss_C.mean()), self.difference(name, self.reference)))
        return rows

    def loss(self, name: str) -> float:
        """The mean over the domains."""
        return float(np.mean([self._mean(name, m) for m in self._members]))

    def difference(self, name: str, other: str) -> tuple[float, float, float]:
        """The loss of ``name`` less that of ``other``, and the interval that holds 95 % of the draws."""
        exact = float(np.mean([self._mean(name, m) - self._mean(other, m) for m in self._members]))
        drawn = np.mean(
            [self._drawn(name, draws) - self._drawn(other, draws) for draws in self._draws], axis=0
        )
        low, high = np.quantile(drawn, [0.025, 0.975])
        return exact, float(low), float(high)

    def _mean(self, name: str, members: NDArray[np.int64]) -> float:
        sums, counts = self.losses[name]
        return float(sums[members].sum() / counts[members].sum())

    def _drawn(self, name: str, draws: NDArray[np.int64]) -> NDArray[np.float64]:
        sums, counts = self.losses[name]
        drawn: NDArray[np.float64] = sums[draws].sum(1) / counts[draws].sum(1)
        return drawn

    def table(self, width: int = 200, title: str = "held-out loss, nats per token") -> Table:
        """For people: losses by domain where ``width`` characters have room for them, their mean, and the
        difference from the reference."""
        table = Table(title=title, title_justify="left", title_style="bold")
        longest = max(map(len, self.losses))
        wide = longest + 40 + sum(3 + max(5, len(domain)) for domain in self.documents.domains) <= width
        table.add_column("model")
        for domain in self.documents.domains if wide else ():
            table.add_column(Text(domain), justify="right")
        table.add_column("mean", justify="right")
        table.add_column(f"less {self.reference} (95 %)", justify="right")
        for row in self.rows():
            low, high = row.difference[1:]
            difference = f"{row.difference[0]:+.3f} ({low:+.3f}, {high:+.3f})"
            cells = [f"{x:.3f}" for x in row.loss_C] if wide else []
            difference = "" if row.name == self.reference else difference
            table.add_row(Text(row.name), *cells, f"{row.loss:.3f}", difference)
        return table

    def domain_table(self, names: Sequence[str]) -> Table:
        """The losses of a few models by domain, a row for each."""
        table = Table(title="the same by role", title_justify="left", title_style="bold")
        table.add_column("text of")
        for name in names:
            table.add_column(Text(name), justify="right")
        losses = {row.name: row.loss_C for row in self.rows()}
        for c, domain in enumerate(self.documents.domains):
            table.add_row(Text(domain), *(f"{losses[name][c]:.3f}" for name in names))
        return table


def oracle(documents: Documents, losses: dict[str, Losses], expert_of: dict[str, str]) -> Losses:
    """Each document by the dense expert of its own domain: what no router can know better."""
    sums = np.empty(len(documents.coded))
    counts = np.empty(len(documents.coded))
    for c, domain in enumerate(documents.domains):
        members = documents.domain_N == c
        its = losses[expert_of[domain]]
        sums[members], counts[members] = its[0][members], its[1][members]
    return sums, counts


def verdict(
    comparison: Comparison, ours: str, against: Sequence[str], oracle_name: str | None = None
) -> list[str]:
    """What the numbers say of ``ours``, in words, also when it is bad news."""
    sentences = []
    worse = []
    for other in against:
        _, low, high = comparison.difference(ours, other)
        if not high < 0:  # NaN too is no better
            worse.append(f"{other} ({'worse' if low > 0 else 'no clear difference'})")
    if worse:
        sentences.append(f"{ours} is NOT clearly better than {', '.join(worse)}.")
    else:
        sentences.append(f"{ours} is better than {', '.join(against)}, each interval clear of zero.")
    if oracle_name is not None:
        closed = gap_closed(comparison, ours, oracle_name)
        sentences.append(
            f"There is no gap to close: {oracle_name} is no better than {comparison.reference}."
            if closed is None
            else f"It closes {100 * closed:.0f} % of the gap from {comparison.reference} to {oracle_name}."
        )
    return sentences


def gap_closed(comparison: Comparison, ours: str, oracle_name: str) -> float | None:
    """(reference - ours) / (reference - oracle); None where the oracle is no better than the reference."""
    reference = comparison.loss(comparison.reference)
    gap = reference - comparison.loss(oracle_name)
    return (reference - comparison.loss(ours)) / gap if gap > 0 else None
