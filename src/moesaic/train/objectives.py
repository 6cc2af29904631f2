"""What is optimised: an objective is ``(model, batch) -> Loss``.

Pretraining, fine-tuning, router training and preference training differ in batch, objective and
what is frozen; they share one loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import Field
from torch import Tensor

from moesaic.config import Options
from moesaic.losses import (
    BalanceConvention,
    ZConvention,
    balance_loss,
    cross_entropy,
    entropy_bonus,
    z_loss,
)
from moesaic.model.transformer import LanguageModel
from moesaic.routing import Routing


class LossOptions(Options):
    """Weights of what is added to the cross-entropy, and the convention each is measured in.

    The conventions are named in losses.py; a weight from another tool's recipe means the same here
    only under that tool's convention.
    """

    balance: float = Field(0.01, ge=0)
    balance_convention: BalanceConvention = "olmoe"
    z: float = Field(0.0, ge=0)
    z_convention: ZConvention = "olmoe"
    entropy: float = Field(0.0, ge=0)


@dataclass(frozen=True)
class Batch:
    """Token ids and the token each position should predict, int64 [B, T]; ``real_BT`` is False at
    padding (None: no padding), ``document_BT`` numbers packed documents (None: a row is one). A target of
    losses.IGNORE is not predicted."""

    ids_BT: Tensor
    target_BT: Tensor
    real_BT: Tensor | None = None
    document_BT: Tensor | None = None

    def rows(self, start: int, end: int) -> "Batch":
        """Some of its rows."""
        return self._each(lambda tensor: tensor[start:end])

    def to(self, device: str) -> "Batch":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        real_BT = None if self.real_BT is None else change(self.real_BT)
        document_BT = None if self.document_BT is None else change(self.document_BT)
        return Batch(change(self.ids_BT), change(self.target_BT), real_BT, document_BT)


@dataclass(frozen=True)
class Loss:
    """The scalar to optimise, its parts for the log, and the routings that made it."""

    total: Tensor
    parts: dict[str, Tensor]
    routings: list[Routing] = field(default_factory=list)


Objective = Callable[[LanguageModel, Batch], Loss]


def next_token(options: LossOptions) -> Objective:
    """Cross-entropy of the next token, plus the routing losses that have a weight."""

    def objective(model: LanguageModel, batch: Batch) -> Loss:
        output = model(batch.ids_BT, batch.real_BT, document_BT=batch.document_BT, logits=False)
        ce = cross_entropy(output.hidden_BTD.flatten(0, 1), model.lm_head, batch.target_BT.flatten())
        total, parts = ce, {"ce": ce.detach()}
        if output.routings:
            for name, weight, compute in (
                ("balance", options.balance, lambda r: balance_loss(r, options.balance_convention)),
                ("z", options.z, lambda r: z_loss(r, options.z_convention)),
                ("entropy", options.entropy, entropy_bonus),
            ):
                if weight:
                    value = compute(output.routings)
                    total = total + weight * value
                    parts[name] = value.detach()
        return Loss(total, parts, output.routings)

    return objective
