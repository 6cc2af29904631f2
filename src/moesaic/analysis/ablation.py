"""What a model's experts are worth to labelled text: its routing, and its loss without them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moesaic.analysis.compare import Comparison, Documents, Losses, losses_of
from moesaic.analysis.plots import specialisation_heatmap
from moesaic.analysis.roles import RoleRouting, expert_number, route_roles, without
from moesaic.analysis.routing import specialisation
from moesaic.data.chat import load_template
from moesaic.data.examples import Coded
from moesaic.data.instructions import read_examples, tokens_of
from moesaic.errors import DataError, RecipeError
from moesaic.lm import LM, load

WHOLE = "all experts"


@dataclass(frozen=True)
class RoleReport:
    """The routing of labelled text, and the losses with and without experts where those were asked for."""

    routing: RoleRouting
    comparison: Comparison | None

    def tables(self, width: int) -> list[Table]:
        """For people, whose terminal is ``width`` characters wide."""
        losses = [] if self.comparison is None else [self.comparison.table(width)]
        if self.comparison is not None and len(losses[0].columns) == 3:  # it had no room for the roles
            losses.append(self.comparison.domain_table([row.name for row in self.comparison.rows()]))
        return [self.routing.table(), *losses]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        losses = {}
        if self.comparison is not None:
            for row in self.comparison.rows():
                losses[row.name] = dict(zip(self.routing.domains, row.loss_C.tolist(), strict=True))
        return {**self.routing.as_json(), **({"loss": losses} if losses else {})}

    def draw(self, path: Path) -> None:
        """Role by expert, a panel for each layer, as PNG. Raises RecipeError."""
        if path.suffix.lower() != ".png":
            raise RecipeError(f"--out {path}: the picture is a PNG; give a name that ends in .png")
        import torch

        shares = torch.stack([specialisation(counts_CE) for counts_CE in self.routing.counts_LCE])
        try:
            specialisation_heatmap(shares, self.routing.layers, self.routing.domains, path)
        except OSError as error:
            raise RecipeError(f"--out {path}: cannot be written: {error.strerror}") from None


def role_report(
    model: Path,
    data: list[str],
    left_out: list[str],
    alone: list[str],
    seq_len: int,
    say: Callable[[str], None],
    memory: int | None = None,
) -> RoleReport:
    """Read the model and the labelled files (``NAME=FILE``) and measure; ``memory`` is as ``load`` has it.
    Raises RecipeError, DataError."""
    lm = load(model, memory=memory)
    if not lm.config.moe_layers:
        raise RecipeError(f"{model}: is a dense model; it has no experts to show")
    if lm.config.position == "learned":
        seq_len = min(seq_len, lm.config.context)
    chosen = {f"without {name}": [expert_number(lm, name)] for name in left_out}
    for name in alone:
        number = expert_number(lm, name)
        chosen[f"only {name}"] = [e for e in range(lm.config.experts.count) if e != number]
    documents = labelled_documents(lm, data, seq_len)
    routing = route_roles(lm, documents, seq_len)
    if not chosen:
        return RoleReport(routing, None)
    losses: dict[str, Losses] = {WHOLE: losses_of(lm.model, documents, seq_len)}
    for name, experts in chosen.items():
        say(f"measuring {name}")
        with without(lm.model, experts):
            losses[name] = losses_of(lm.model, documents, seq_len)
    return RoleReport(routing, Comparison(documents, WHOLE, losses))


def labelled_documents(lm: LM, data: list[str], seq_len: int) -> Documents:
    """Every example of the files ``NAME=FILE`` that has something to predict. Raises DataError."""
    import numpy as np

    domains: list[str] = []
    coded: list[Coded] = []
    domain_N: list[int] = []
    template = load_template(lm.path)
    for word in data:
        name, equals, file = word.partition("=")
        if not equals or not name or name in domains:
            raise RecipeError(f"--data {word}: write NAME=FILE, each name once")
        found = [
            (ids[: seq_len + 1], learnt[: seq_len + 1])
            for example in read_examples(Path(file).expanduser(), name)
            for ids, learnt in [tokens_of(example, lm.tokenizer, template)]
            if learnt[1 : seq_len + 1].any()
        ]
        if not found:
            raise DataError(f"{file}: nothing to predict in the first {seq_len} tokens of any example")
        domain_N += [len(domains)] * len(found)
        domains.append(name)
        coded += found
    return Documents(domains, coded, np.array(domain_N, np.int64))
