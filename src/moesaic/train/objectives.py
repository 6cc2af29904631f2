"""What is optimised: an objective is ``(model, batch) -> Loss``.

Pretraining, fine-tuning, router training and preference training differ in batch, objective and
what is frozen; they share one loop.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moesaic.config import Options
from moesaic.losses import (
    AVERAGED,
    IGNORE,
    BalanceConvention,
    ZConvention,
    balance_loss,
    cross_entropy,
    entropy_bonus,
    preference_losses,
    token_losses,
    z_loss,
)
from moesaic.model.transformer import LanguageModel
from moesaic.routing import Routing


class LossOptions(Options):
    """What is optimised, weights of what is added to it, and the convention each is measured in.

    The conventions are named in losses.py; a weight from another tool's recipe means the same here
    only under that tool's convention. ``reduction`` of ``next_token``: the mean over all tokens of a step
    that are predicted, or their sum (OLMoE's fine-tuning), under which long answers weigh more and a learning
    rate means another thing. ``beta`` and ``label_smoothing`` belong to preferences.
    """

    objective: Literal["next_token", "dpo", "dpo_norm", "ipo", "kto"] = "next_token"
    reduction: Literal["mean", "sum"] = "mean"
    beta: float = Field(0.1, gt=0)  # of preferences
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)

    balance: float = Field(0.01, ge=0)
    balance_convention: BalanceConvention = "olmoe"
    z: float = Field(0.0, ge=0)
    z_convention: ZConvention = "olmoe"
    entropy: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _is_read(self) -> "LossOptions":
        if self.objective != "next_token" and self.reduction != "mean":
            raise ValueError("reduction = 'sum' is for next_token; preferences are averaged over pairs")
        if self.label_smoothing and self.objective not in ("dpo", "dpo_norm"):
            raise ValueError(f"label_smoothing is for dpo and dpo_norm, not for {self.objective}")
        return self


@dataclass(frozen=True)
class Batch:
    """Token ids and the token each position should predict, int64 [B, T]; ``real_BT`` is False at
    padding (None: no padding), ``document_BT`` numbers packed documents (None: a row is one), ``reference_B``
    is what a reference model gives the predicted tokens of a row. A target of losses.IGNORE is not predicted.

    It is one of the ``parts`` of a step; ``share`` is how much of the step's predicted tokens it has, times
    their number: 1 where all have as many. A mean over a step's tokens is the mean of its parts' means times
    their shares."""

    ids_BT: Tensor
    target_BT: Tensor
    real_BT: Tensor | None = None
    document_BT: Tensor | None = None
    reference_B: Tensor | None = None
    share: float = 1.0
    parts: int = 1

    def rows(self, start: int, end: int) -> "Batch":
        """Some of its rows."""
        return self._each(lambda tensor: tensor[start:end])

    def to(self, device: str) -> "Batch":
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        optional = [self.real_BT, self.document_BT, self.reference_B]
        others = [None if tensor is None else change(tensor) for tensor in optional]
        ids_BT, target_BT = change(self.ids_BT), change(self.target_BT)
        return Batch(ids_BT, target_BT, others[0], others[1], others[2], self.share, self.parts)

    def split(self, parts: int) -> list["Batch"]:
        """The batch in ``parts`` of as many rows."""
        size, whole = len(self.ids_BT) // parts, int((self.target_BT != IGNORE).sum())
        batches = [self.rows(i, i + size) for i in range(0, len(self.ids_BT), size)]
        counts = [int((batch.target_BT != IGNORE).sum()) for batch in batches]
        return [
            replace(b, share=parts * n / max(1, whole), parts=parts)
            for b, n in zip(batches, counts, strict=True)
        ]


@dataclass(frozen=True)
class Loss:
    """The scalar to optimise, its parts for the log (``main`` is what the objective is about), and the
    routings that made it."""

    total: Tensor
    parts: dict[str, Tensor]
    routings: list[Routing] = field(default_factory=list)


Objective = Callable[[LanguageModel, Batch], Loss]


def objective_of(options: LossOptions) -> Objective:
    """The objective that the options name."""
    return next_token(options) if options.objective == "next_token" else preference(options)


def next_token(options: LossOptions) -> Objective:
    """Cross-entropy of the next token, plus the routing losses that have a weight."""

    def objective(model: LanguageModel, batch: Batch) -> Loss:
        output = model(batch.ids_BT, batch.real_BT, document_BT=batch.document_BT, logits=False)
        ce = cross_entropy(output.hidden_BTD.flatten(0, 1), model.lm_head, batch.target_BT.flatten())
        main = ce * batch.share  # a share of 1 changes no bit
        tokens = (batch.target_BT != IGNORE).sum()
        total = ce * tokens * batch.parts if options.reduction == "sum" else main
        return _with_routing(options, total, {"main": main.detach()}, output.routings)

    return objective


def preference(options: LossOptions) -> Objective:
    """How much more likely than under the reference the chosen answer has become, beside the rejected one."""
    kind = options.objective
    assert kind != "next_token"

    def objective(model: LanguageModel, batch: Batch) -> Loss:
        assert batch.reference_B is not None
        logp_B, count_B, routings = answer_logprobs(model, batch)
        ratio_B = logp_B - batch.reference_B
        scaled_B = ratio_B / count_B if kind in AVERAGED else ratio_B
        chosen_P, rejected_P = scaled_B[0::2], scaled_B[1::2]
        loss = preference_losses(kind, chosen_P, rejected_P, options.beta, options.label_smoothing).mean()
        with torch.no_grad():
            parts = {
                "main": loss.detach(),
                "margin": options.beta * (chosen_P - rejected_P).mean(),
                "accuracy": (chosen_P > rejected_P).float().mean(),
                "chosen_logp": logp_B[0::2].mean(),
                "rejected_logp": logp_B[1::2].mean(),
                "kl": (ratio_B.sum() / count_B.sum()),
            }
        return _with_routing(options, loss, parts, routings)

    return objective


def answer_logprobs(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor, list[Routing]]:
    """The summed log-probability of each row's predicted tokens in nats, float32 [B], how many they are, and
    the routings."""
    output = model(batch.ids_BT, batch.real_BT, document_BT=batch.document_BT, logits=False)
    losses_N = token_losses(output.hidden_BTD.flatten(0, 1), model.lm_head, batch.target_BT.flatten())
    count_B = (batch.target_BT != IGNORE).sum(1)
    return -losses_N.view_as(batch.target_BT).sum(1), count_B, output.routings


def _with_routing(
    options: LossOptions, total: Tensor, parts: dict[str, Tensor], routings: list[Routing]
) -> Loss:
    if routings:
        for name, weight, compute in (
            ("balance", options.balance, lambda r: balance_loss(r, options.balance_convention)),
            ("z", options.z, lambda r: z_loss(r, options.z_convention)),
            ("entropy", options.entropy, entropy_bonus),
        ):
            if weight:
                value = compute(routings)
                total = total + weight * value
                parts[name] = value.detach()
    return Loss(total, parts, routings)
