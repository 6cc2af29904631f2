"""Which domain the next batch is of: all at once, one after the other, or the one that promises most.

Its state is part of a checkpoint, so a resumed run takes up the same domain at the same place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from moesaic.config import Options
from moesaic.data.store import generator_of

_FADE = 0.8  # of what a domain's loss was, at each of its steps


class CurriculumOptions(Options):
    """``mixed``: every batch is of all domains. ``fixed``: domain after domain, in their order; ``shuffled``:
    in an order made of the seed. ``dopamine``: for ``visit`` steps at a time the domain is drawn by its
    reward, novelty · 1 / (1 + visits) + weakness · (its recent loss over the mean) - cost · (visits over the
    mean), through a softmax of ``temperature``.

    A stage of ``fixed`` and ``shuffled`` ends after ``stage`` steps, or when its loss has not come down by
    ``gain`` for ``patience`` steps; after the last domain the first comes again. A stage's end is saved.
    """

    order: Literal["mixed", "fixed", "shuffled", "dopamine"] = "mixed"
    stage: int = Field(40, ge=1)
    patience: int = Field(12, ge=1)
    gain: float = Field(0.01, ge=0)
    visit: int = Field(10, ge=1)
    novelty: float = Field(1.0, ge=0)
    weakness: float = Field(1.0, ge=0)
    cost: float = Field(0.2, ge=0)
    temperature: float = Field(0.3, gt=0)


@dataclass
class Seen:
    """What is known of a domain: stages begun, steps made, the first loss it ever had, and the recent one."""

    visits: int = 0
    steps: int = 0
    first: float | None = None
    recent: float | None = None


@dataclass
class Curriculum:
    """Where a run is among its domains. ``now`` is the domain of the next step, ``left`` how many steps its
    stage has at most, ``best`` its loss so far and ``stale`` the steps since."""

    options: CurriculumOptions
    domains: Sequence[str]
    seed: int
    seen: dict[str, Seen] = field(default_factory=dict)
    now: str | None = None
    left: int = 0
    best: float = math.inf
    stale: int = 0
    stages: int = 0

    def __post_init__(self) -> None:
        self.seen = {domain: self.seen.get(domain, Seen()) for domain in self.domains}

    def domain(self) -> str | None:
        """The domain of the next step; None: all of them."""
        if self.options.order != "mixed" and self.now is None:
            self._begin()
        return self.now

    def turn(self) -> int:
        """The number of the next step among its domain's own, from 1."""
        assert self.now is not None
        return self.seen[self.now].steps + 1

    def after_step(self, loss: float) -> dict[str, Any] | None:
        """Take the loss of a step; a stage that has ended by it: its domain, steps, first and last loss."""
        if self.now is None:
            return None
        seen = self.seen[self.now]
        seen.steps += 1
        seen.first = loss if seen.first is None else seen.first
        seen.recent = loss if seen.recent is None else _FADE * seen.recent + (1 - _FADE) * loss
        self.left -= 1
        self.stale += 1
        if seen.recent < self.best - self.options.gain:
            self.best, self.stale = seen.recent, 0
        patient = self.options.order == "dopamine" or self.stale < self.options.patience
        if self.left > 0 and patient:
            return None
        ended = {"domain": self.now, "first": seen.first, "recent": seen.recent, "steps": seen.steps}
        self.now = None
        return {**ended, "stage": self.stages}

    def pass_over(self) -> None:
        """Leave a step out, its batch with it."""
        if self.domain() is not None:
            assert self.now is not None
            self.seen[self.now].steps += 1
            self.left = max(1, self.left - 1)

    def _begin(self) -> None:
        options = self.options
        if options.order == "dopamine":
            self.now, self.left = self._drawn(), options.visit
        else:
            order = list(self.domains)
            if options.order == "shuffled":
                generator_of(self.seed, -1).shuffle(order)
            self.now, self.left = order[self.stages % len(order)], options.stage
        self.stages += 1
        self.seen[self.now].visits += 1
        self.best, self.stale = math.inf, 0

    def rewards(self) -> dict[str, float]:
        """What each domain promises."""
        known = [seen.recent for seen in self.seen.values() if seen.recent is not None]
        loss = sum(known) / len(known) if known else 1.0
        visits = max(1.0, sum(seen.visits for seen in self.seen.values()) / len(self.seen))
        options = self.options
        return {
            name: options.novelty / (1 + seen.visits)
            + options.weakness * ((loss if seen.recent is None else seen.recent) / max(loss, 1e-9) - 1)
            - options.cost * seen.visits / visits
            for name, seen in self.seen.items()
        }

    def _drawn(self) -> str:
        values = np.array(list(self.rewards().values())) / self.options.temperature
        odds = np.exp(values - values.max())
        draw = generator_of(self.seed, 2**40 + self.stages)
        return list(self.seen)[int(draw.choice(len(odds), p=odds / odds.sum()))]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        own = {name: getattr(self, name) for name in ("now", "left", "stale", "stages")}
        seen = {name: vars(one) for name, one in self.seen.items()}
        return {**own, "best": None if math.isinf(self.best) else self.best, "seen": seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Be where a checkpoint was. Raises KeyError for one of other domains."""
        self.now, self.left, self.stale = state["now"], state["left"], state["stale"]
        self.stages = state["stages"]
        self.best = math.inf if state["best"] is None else state["best"]
        self.seen = {domain: Seen(**state["seen"][domain]) for domain in self.domains}
