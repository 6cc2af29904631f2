"""What a merge is worth: everything else that could be made of the same parts, measured on the same text.

SmolMoE's own recipe is reconstructed, since its constants are not public: all that is shared comes from one
expert, the router is random, only it is trained, and the balance loss is summed over the layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from moesaic.analysis.compare import (
    Comparison,
    Losses,
    Row,
    gap_closed,
    held_out,
    losses_of,
    oracle,
    switching,
    verdict,
)
from moesaic.errors import RecipeError
from moesaic.lm import described, load
from moesaic.model.transformer import LanguageModel
from moesaic.train.merge_parts import Parts, Say
from moesaic.weights.carried import carried_files
from moesaic.weights.hf import write_hf

BASE, ORACLE, SOUP = "base", "oracle (own expert)", "average (soup)"
RANDOM, HIDDEN, SMOL = "random router", "mergekit's hidden router", "SmolMoE's recipe"
DENSE, WIDE = "dense, all data", "dense of as many active parameters, all data"
_RESERVED = {BASE, ORACLE, SOUP, RANDOM, HIDDEN, SMOL, DENSE, WIDE}

Models = Mapping[str, Path]


def rivals(parts: Parts, router_steps: int, lr: float | None, say: Say) -> tuple[Models, list[str]]:
    """What else the experts could have become, by name, and a sentence for each that is missing: without
    ``router_steps`` there is no SmolMoE, whose router is trained, at rate ``lr`` or the recipe's."""
    check_names(parts.experts)
    models: dict[str, Path] = {BASE: parts.base, **parts.dense_experts(say)}
    left_out: list[str] = []
    say("averaging the experts")
    models[SOUP] = parts.soup()
    models[RANDOM] = parts.merged("random", say, router={"init": "random"})
    if all(source.positive for source in parts.options(router={"init": "zero"}).experts.values()):
        models[HIDDEN] = parts.merged("hidden", say, router={"init": "prompts"})
    else:
        left_out.append(f"{HIDDEN} (an expert has neither prompts nor data)")
    if router_steps:
        models[SMOL] = _smolmoe(parts, router_steps, lr, say)
    else:
        left_out.append(f"{SMOL} (--router-steps says how long to train it)")
    return models, left_out


def check_names(experts: Mapping[str, Path]) -> None:
    """Raise RecipeError for an expert whose name is one of those of the table."""
    for name in experts:
        if name in _RESERVED:
            raise RecipeError(f"{name!r} names a row of the comparison; give the expert another name")


def dense_rivals(
    parts: Parts, top_k: int, steps: int, lr: float | None, say: Say
) -> tuple[Models, list[str]]:
    """What the base becomes when it is trained on all of the data for as many ``steps`` as all stages of the
    merge had: as it is, and with networks as wide as what a token meets in the merge."""
    if not steps:
        return {}, ["dense models of all data (--dense-steps says how long to train them)"]
    words = [*_rate(lr), "train.only=[]", "data.join=0.5"]
    wide = widened(parts, top_k, say)
    return {
        DENSE: parts.stage("dense", "expert", parts.base, steps, say, *words),
        WIDE: parts.stage("dense-wide", "expert", wide, steps, say, *words),
    }, []


def _rate(lr: float | None) -> list[str]:
    return [] if lr is None else [f"optim.lr={lr}"]


def _smolmoe(parts: Parts, steps: int, lr: float | None, say: Say) -> Path:
    first = next(iter(parts.experts))
    start = parts.merged("smolmoe-merge", say, shared=f"expert:{first}", router={"init": "random"})
    layers = len(described(start)[0].moe_layers)
    words = [f"loss.balance={0.01 * layers}", "data.join=0", *_rate(lr)]
    return parts.stage("smolmoe", "router", start, steps, say, *words)


def widened(parts: Parts, times: int, say: Say) -> Path:
    """The base with feed-forward networks ``times`` as wide, so that a token meets as many parameters as in
    the merge. What is new returns nothing yet (its down projection is zero), so it begins as the base."""

    def make(out: Path) -> None:
        say(f"widening the base's networks {times} times")
        lm = load(parts.base)
        ffn = lm.config.ffn.model_copy(update={"hidden": times * lm.config.ffn.hidden})
        config = lm.config.model_copy(update={"ffn": ffn})
        torch.manual_seed(parts.seed)
        model = LanguageModel(config)
        own = model.state_dict()
        for name, tensor in lm.model.state_dict().items():
            if own[name].shape == tensor.shape:
                own[name].copy_(tensor)
            elif name.endswith("down_proj.weight"):
                own[name].zero_()[:, : tensor.shape[1]] = tensor
            else:
                own[name][: len(tensor)] = tensor
        files = carried_files(parts.base)
        files["tokenizer.json"] = lm.tokenizer.library.to_str(pretty=True).encode()
        write_hf(out, config, model, files, sorted(lm.stop_ids))

    return parts.derived(f"base-{times}-wide", make)


@dataclass(frozen=True)
class Proof:
    """The losses of all on the held-out documents of every role, and on documents that change role in the
    middle. ``ours`` is what is judged, ``stages`` ours on the way."""

    ours: str
    stages: Sequence[str]
    documents: Comparison
    changing: Comparison | None
    left_out: Sequence[str]

    @property
    def closed(self) -> dict[str, float | None]:
        """The share of the gap from base to oracle that each of our stages closes; None where there is
        none."""
        return {name: gap_closed(self.documents, name, ORACLE) for name in self.stages}

    def sentences(self) -> list[str]:
        """The verdict in words, also when it is bad news; and what was not compared."""
        beaten = [n for n in self.documents.losses if n not in (*self.stages, ORACLE, DENSE, WIDE)]
        said = verdict(self.documents, self.ours, beaten, ORACLE)
        for name in (DENSE, WIDE):
            if name in self.documents.losses:
                said += verdict(self.documents, self.ours, [name])
        if self.changing is not None:
            said += [f"On texts that change role: {s}" for s in verdict(self.changing, self.ours, [BASE])]
        return said + [f"Not compared: {sentence}." for sentence in self.left_out]

    def tables(self, width: int) -> list[Table]:
        """For people, whose terminal is ``width`` characters wide."""
        few = [n for n in (BASE, self.stages[0], self.ours, ORACLE) if n in self.documents.losses]
        title = "the same on texts that change role in the middle"
        first = self.documents.table(width)
        by_role = [self.documents.domain_table(list(dict.fromkeys(few)))] if len(first.columns) == 3 else []
        return [first, *by_role, *([self.changing.table(width, title)] if self.changing is not None else [])]

    def markdown(self) -> str:
        """For a model card."""
        lines = [
            f"| | mean loss, nats per token | less {BASE} (95 %) | texts that change role |",
            "|---|---|---|---|",
        ]
        changing = {row.name: row.loss for row in self._changing_rows()}
        for row in self.documents.rows():
            low, high = row.difference[1:]
            less = "" if row.name == BASE else f"{row.difference[0]:+.3f} ({low:+.3f}, {high:+.3f})"
            other = f"{changing[row.name]:.3f}" if row.name in changing else ""
            plain = row.name.replace("|", "/")
            name = f"**{plain}**" if row.name == self.ours else plain
            lines.append(f"| {name} | {row.loss:.3f} | {less} | {other} |")
        count, domains = len(self.documents.documents.coded), self.documents.documents.domains
        head = f"{count:,} held-out texts of {', '.join(domains)}; intervals of the paired bootstrap."
        return "\n\n".join([head, "\n".join(lines), "\n".join(f"- {s}" for s in self.sentences())])

    def _changing_rows(self) -> list[Row]:
        return [] if self.changing is None else self.changing.rows()

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        rows = {}
        for row in self.documents.rows():
            by_role = dict(zip(self.documents.documents.domains, row.loss_C.tolist(), strict=True))
            rows[row.name] = {"loss": row.loss, "less_base": list(row.difference), "roles": by_role}
        for row in self._changing_rows():
            rows[row.name]["changing"] = row.loss
        return {"ours": self.ours, "models": rows, "closed": self.closed, "verdict": self.sentences()}


def check_roles(parts: Parts) -> None:
    """Raise RecipeError for data of a role that no expert has, which the oracle needs."""
    alone = sorted(set(parts.roles) - set(parts.experts))
    if alone:
        raise RecipeError(
            f"data of {alone[0]}: no expert has that name; there are {', '.join(parts.experts)}"
        )


def prove(parts: Parts, others: Models, ours: Models, left_out: Sequence[str], say: Say) -> Proof:
    """Measure all models on the same text. ``ours`` are the stages, the last being what is judged.

    Raises RecipeError for a name that two of them have, and as ``check_roles``.
    """
    twice = sorted(set(others) & set(ours))
    if twice:
        raise RecipeError(f"{twice[0]!r} names two models; give the stage another name")
    check_roles(parts)
    store = parts.store()
    documents, changing = held_out(store), switching(store, parts.seq_len)
    losses: dict[str, Losses] = {}
    switches: dict[str, Losses] = {}
    for name, model in (*others.items(), *ours.items()):
        say(f"measuring {name}")
        network = load(model).model
        losses[name] = losses_of(network, documents, parts.seq_len)
        if changing is not None:
            switches[name] = losses_of(network, changing, parts.seq_len)
    losses[ORACLE] = oracle(documents, losses, {role: role for role in parts.roles})
    return Proof(
        list(ours)[-1],
        list(ours),
        Comparison(documents, BASE, losses),
        None if changing is None else Comparison(changing, BASE, switches),
        left_out,
    )
