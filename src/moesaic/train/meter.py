"""What the steps since the last row were like: losses, pace, where tokens went.

Shape legend: L sparse layers, E experts.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.analysis.routing import counts_per_layer, dropped_share, summarise_load
from moesaic.model.routers import Smart
from moesaic.offload.experts import DiskExperts
from moesaic.train.objectives import Loss
from moesaic.train.session import Progress, Session

_RECENT = 100  # steps
_PERCENTILES = (50, 90, 99)


class Meter:
    """Gathers steps until a row is due."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Tensor]] = []
        self.last: list[Loss] = []
        self.norm, self.seconds, self.steps = 0.0, 0.0, 0

    def add(self, losses: list[Loss], norm: float, seconds: float) -> None:
        self.losses += [loss.parts for loss in losses]
        self.last, self.norm = losses, norm
        self.seconds += seconds
        self.steps += 1

    def now(self, session: Session) -> tuple[float, float, str]:
        """For the eye: the mean loss, the pace, and how uneven the experts' load is, or of thousands on disk
        how many were ever used."""
        options = session.recipe.train
        loss = float(torch.stack([parts["main"] for parts in self.losses]).mean())
        pace = self.steps * options.batch_size * options.seq_len / self.seconds
        if session.experts is not None:
            return loss, pace, f"{experts_used(session.experts)['experts_used']:.1%} of experts used"
        routings = self.last[-1].routings
        if not routings:
            return loss, pace, ""
        return loss, pace, f"balance {summarise_load(counts_per_layer(routings, wanted=True)).balance:.2f}"

    def row(self, session: Session, progress: Progress) -> dict[str, Any]:
        """A row of metrics.jsonl: losses are means since the last row, the load is the last step's."""
        options = session.recipe.train
        parts = {k: torch.stack([p[k] for p in self.losses]).mean().item() for k in self.losses[0]}
        row: dict[str, Any] = {
            "step": progress.step,
            "split": "train",
            "loss": parts.pop("main"),
            "tokens": progress.tokens,
            "time": progress.seconds,
            "tokens_per_second": self.steps * options.batch_size * options.seq_len / self.seconds,
            "lr": session.optimizers[-1].param_groups[0]["lr"],
            "grad_norm": self.norm,
            **{f"loss_{name}": value for name, value in parts.items()},
        }
        if self.last[0].routings:
            each_LE = [counts_per_layer(loss.routings, wanted=True) for loss in self.last]
            load = summarise_load(torch.stack(each_LE).sum(0))
            row |= {"balance": load.balance, "balance_layers": [round(b, 4) for b in load.balance_L]}
            row |= {"dead": load.dead_share, "load_entropy": load.entropy}
            row |= {"drop": dropped_share([r for loss in self.last for r in loss.routings])}
        if temperatures := [float(t.detach().exp()) for t in _temperatures(session)]:
            row |= {"temperature": sum(temperatures) / len(temperatures)}
        if session.experts is not None:
            row |= experts_used(session.experts)
        return row


def experts_used(experts: DiskExperts) -> dict[str, float]:
    """Of experts on disk: the share that ever had a gradient, and that had one in the last 100 steps; in how
    many steps (percentiles)."""
    index, now = experts.store.index, experts.history.step
    found = {
        "experts_used": float((index.steps > 0).mean()),
        "experts_recent": float((index.stamp > max(0, now - _RECENT)).mean()),
    }
    values = np.percentile(index.steps, _PERCENTILES)
    return found | {f"expert_steps_p{p}": float(v) for p, v in zip(_PERCENTILES, values, strict=True)}


def _temperatures(session: Session) -> list[Tensor]:
    gates = [module.gate for module in session.model.moe_modules()]
    return [gate.log_temperature for gate in gates if isinstance(gate, Smart)]
