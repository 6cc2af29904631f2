"""Who serves whom: the experts of a model on labelled text, and what each is worth.

Shape legend: L sparse layers, C domains, E experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from moesaic.analysis.compare import Documents
from moesaic.analysis.routing import (
    counts_per_layer,
    mutual_information,
    specialisation,
    summarise_load,
)
from moesaic.data.examples import padded
from moesaic.errors import RecipeError
from moesaic.lm import LM
from moesaic.model.routers import LossFree
from moesaic.model.transformer import LanguageModel

_BATCH = 32


@dataclass(frozen=True)
class RoleRouting:
    """How often the text of each domain chose each expert, int64 [L, C, E]."""

    domains: list[str]
    names: list[str]
    layers: list[int]
    counts_LCE: Tensor

    def table(self) -> Table:
        """The share of each domain's choices, over all layers, that went to each expert, in percent."""
        counts_CE = self.counts_LCE.sum(0)
        table = Table(title="choices of each role, %", title_justify="left", title_style="bold", box=None)
        table.add_column("text of", style="cyan")
        for name in self.names:
            table.add_column(name, justify="right")
        for domain, row in zip(self.domains, specialisation(counts_CE).tolist(), strict=True):
            most = max(row)
            cells = [Text(f"{100 * x:.0f}", style="bold" if x == most else "") for x in row]
            table.add_row(domain, *cells)
        return table

    def summary(self) -> str:
        """What the whole table comes to, in a sentence."""
        load, bits = summarise_load(self.counts_LCE.sum(1)), mutual_information(self.counts_LCE.sum(0))
        return (
            f"An expert's name tells {bits:.2f} bits of the role. Load entropy {load.entropy:.3f} of 1, "
            f"busiest expert {load.balance:.2f} × the mean, {100 * load.dead_share:.0f} % of experts dead."
        )

    def as_json(self) -> dict[str, Any]:
        """What the table shows, and the counts of every layer."""
        load = summarise_load(self.counts_LCE.sum(1))
        return {
            "domains": self.domains,
            "experts": self.names,
            "layers": self.layers,
            "counts": self.counts_LCE.tolist(),
            "mutual_information_bits": mutual_information(self.counts_LCE.sum(0)),
            "load_entropy": load.entropy,
            "balance": load.balance,
            "dead_share": load.dead_share,
        }


@torch.inference_mode()
def route_roles(lm: LM, documents: Documents, seq_len: int) -> RoleRouting:
    """Run labelled documents through the model and count who took them; padding is left out."""
    config = lm.config
    counts_LCE = torch.zeros(
        len(config.moe_layers), len(documents.domains), config.experts.count, dtype=torch.int64
    )
    for c in range(len(documents.domains)):
        coded = [e for e, d in zip(documents.coded, documents.domain_N, strict=True) if d == c]
        for start in range(0, len(coded), _BATCH):
            windows = padded(coded[start : start + _BATCH], seq_len)
            ids_BT, real_BT = windows.ids_BT, windows.real_BT
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if real_BT is None else real_BT
            output = lm.model(lm.to_device(ids_BT), lm.to_device(real_BT), logits=False)
            counts_LCE[:, c] += counts_per_layer(output.routings).cpu()
    names = [config.experts.name(e) for e in range(config.experts.count)]
    return RoleRouting(documents.domains, names, config.moe_layers, counts_LCE)


def expert_number(lm: LM, name: str) -> int:
    """An expert by its name or number. Raises RecipeError."""
    options = lm.config.experts
    names = options.names or []
    if name in names:
        return names.index(name)
    if name.isdigit() and int(name) < options.count:
        return int(name)
    raise RecipeError(f"{name!r} is no expert; there are {', '.join(names) or f'0 to {options.count - 1}'}")


@contextmanager
def without(model: LanguageModel, experts: Sequence[int]) -> Iterator[None]:
    """The model as if it did not have these experts: no router can choose them. Raises RecipeError where none
    would be left."""
    gates = [layer.gate for layer in model.moe_modules()]
    if len(set(experts)) >= model.config.experts.count:
        raise RecipeError("no expert would be left; leave one out less")
    barred = torch.zeros(model.config.experts.count)
    barred[list(experts)] = -torch.inf
    before = [gate.bias for gate in gates]
    steering = [g for g in gates if isinstance(g, LossFree)]  # its own bias comes after the scores
    steered = [gate.e_score_correction_bias.clone() for gate in steering]
    for steered_gate in steering:
        steered_gate.e_score_correction_bias += barred.to(steered_gate.e_score_correction_bias)
    try:
        for gate in gates:
            own = gate.bias
            blocked = barred.to(gate.weight.device, torch.float32)
            gate.bias = torch.nn.Parameter(
                blocked if own is None else own.float() + blocked, requires_grad=False
            )
        yield
    finally:
        for gate, bias in zip(gates, before, strict=True):
            gate.bias = bias
        for steered_gate, kept in zip(steering, steered, strict=True):
            steered_gate.e_score_correction_bias.copy_(kept)
