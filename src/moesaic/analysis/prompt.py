"""The routing of one text: per layer the dominant experts, per token who took it.

Shape legend: L sparse layers, T tokens, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from moesaic.analysis.plots import token_heatmap
from moesaic.analysis.routing import dominant_experts, token_weights
from moesaic.lm import LM
from moesaic.routing import Routing


@dataclass(frozen=True)
class PromptRouting:
    """The routings of one text, with what is needed to show them."""

    tokens: list[str]
    layers: list[int]
    routings: list[Routing]
    names: list[str] | None = None

    def name(self, expert: int) -> str:
        """An expert as tables call it."""
        return self.names[expert] if self.names else f"expert {expert}"

    @property
    def num_experts(self) -> int:
        return self.routings[0].num_experts

    def layer_table(self, most: int = 3) -> Table:
        """Per layer the dominant experts and their share of the gate weight (their confidence)."""
        table = Table(title=f"routing of {len(self.tokens)} tokens", title_justify="left", title_style="bold")
        table.add_column("layer", justify="right")
        for rank in range(min(most, self.num_experts)):
            table.add_column(["dominant expert", "second", "third"][rank] if rank < 3 else f"{rank + 1}th")
        table.add_column("experts used", justify="right")
        for layer, routing in zip(self.layers, self.routings, strict=True):
            best = dominant_experts(routing, most)
            cells = [f"{self.name(b.expert)}  {100 * b.confidence:.0f}%" for b in best]
            cells += [""] * (min(most, self.num_experts) - len(cells))
            used = int((routing.counts_E() > 0).sum())
            table.add_row(str(layer), *cells, f"{used} of {routing.num_experts}")
        return table

    def token_table(self) -> Table:
        """Per token the first expert of every sparse layer, with its weight in percent."""
        table = Table(title="first expert of each token (and its weight in %)", title_justify="left")
        table.add_column("token")
        for layer in self.layers:
            table.add_column(f"layer {layer}", justify="right")
        first, weight = self._first()
        for index, token in enumerate(self.tokens):
            cells = [
                f"{self.names[first[i][index]] if self.names else first[i][index]} ({100 * w[index]:.0f})"
                for i, w in enumerate(weight)
            ]
            table.add_row(Text(token), *cells)  # Text: a token may hold what rich takes for markup
        return table

    def as_json(self) -> dict[str, Any]:
        """Everything the tables show, and every choice of every token."""
        layers = []
        for layer, routing in zip(self.layers, self.routings, strict=True):
            choices = []
            for experts, weights, keep in zip(
                routing.expert_TK.tolist(), routing.weight_TK.tolist(), routing.keep_TK.tolist(), strict=True
            ):
                kept = [(e, w) for e, w, k in zip(experts, weights, keep, strict=True) if k]
                choices.append({"experts": [e for e, _ in kept], "weights": [round(w, 6) for _, w in kept]})
            dominant = [vars(share) for share in dominant_experts(routing)]
            layers.append({"layer": layer, "dominant": dominant, "tokens": choices})
        names = {} if self.names is None else {"expert_names": self.names}
        return {"tokens": self.tokens, "num_experts": self.num_experts, **names, "layers": layers}

    def draw(self, path: Path) -> None:
        """The heat map of tokens and layers as PNG."""
        first, weight = self._first()
        token_heatmap(
            torch.tensor(first), torch.tensor(weight), self.tokens, self.layers, self.num_experts, path
        )

    def _first(self) -> tuple[list[list[int]], list[list[float]]]:
        best = [token_weights(r).max(1) for r in self.routings]
        return [b.indices.tolist() for b in best], [b.values.tolist() for b in best]


def route_prompt(lm: LM, prompt: str) -> PromptRouting:
    """Run ``prompt`` through the model and keep its routings.

    Only its last ``config.context`` tokens are looked at; a dense model has no routings (the list
    is empty, and the caller says so).
    """
    ids_BT = lm.ids(prompt)[:, -lm.config.context :]
    tokens = [lm.tokenizer.token_text(token) for token in ids_BT[0].tolist()]
    return PromptRouting(tokens, lm.config.moe_layers, lm.routing(ids_BT), lm.config.experts.names)
