"""``moesaic analyze``: how a model routes labelled text, and how early its checkpoints did so.

Shape legend: L sparse layers, N windows, B windows of a batch, T positions, K choices, E experts, C domains.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.analysis import measures, routing_plots
from moesaic.analysis.census import KINDS, Census, Kind
from moesaic.analysis.routing import mutual_information, summarise_load
from moesaic.data.chat import load_template
from moesaic.data.instructions import read_examples, tokens_of
from moesaic.errors import CheckpointError, DataError, RecipeError
from moesaic.files import write_atomic
from moesaic.lm import LM, load
from moesaic.weights.checkpoint import step_of

Say = Callable[[str], None]
_BATCH_TOKENS, _MOST_LOGITS = 4096, 2**24


@dataclass(frozen=True)
class Choices:
    """What one model chose on the text: the counts, and every layer's choices [tokens, K] in reading
    order."""

    label: str
    census: Census
    chosen: list[Tensor]


@dataclass(frozen=True)
class Analysis:
    """The last model's counts and, for earlier checkpoints, how much of its routing they already had.

    ``saturation`` is label -> layer -> (at top-k, at top-1). ``least`` is how often a token id must occur to
    count.
    """

    census: Census
    top_k: int
    least: int
    saturation: dict[str, list[tuple[float, float]]]

    def as_json(self) -> dict[str, Any]:
        """All figures, by layer where they are by layer."""
        census = self.census
        chosen_LE = census.chosen_LCE.sum(1)
        E = census.experts
        # What is carried out for a token: top-k, or fewer where the router decides.
        k = float(chosen_LE.sum() / (census.token_C.sum() * len(census.layers)).clamp(min=1))
        return {
            "layers": census.layers,
            "experts": census.names or E,
            "top_k": self.top_k,
            "experts_per_token": k,
            "tokens": dict(zip(census.domains, census.token_C.tolist(), strict=True)),
            "chance": {
                "saturation": k / E,
                "saturation_top1": 1 / E,
                "coactivation": max(0.0, k - 1) / max(1, E - 1),
            },
            "saturation": {
                label: {"top_k": [s for s, _ in rows], "top_1": [s for _, s in rows]}
                for label, rows in self.saturation.items()
            },
            "domain_shares": _nested(measures.domain_shares(c, census.token_C) for c in census.chosen_LCE),
            "domain_bits": [mutual_information(c) for c in census.chosen_LCE],
            "coactivation": _nested(map(measures.coactivation, census.pair_LEE, chosen_LE)),
            "coactivation_adjacent_ranks": _nested(
                map(measures.coactivation, census.adjacent_LEE, chosen_LE)
            ),
            "vocabulary": {kind: self.vocabulary(kind) for kind in KINDS},
            "transitions": _nested(map(measures.transitions, census.step_LEE)),
            "transition_bits": [measures.transition_bits(step) for step in census.step_LEE],
            "load": {
                "balance": summarise_load(chosen_LE).balance_L,
                "entropy": [summarise_load(row[None]).entropy for row in chosen_LE],
                "dead": [int((row == 0).sum()) for row in chosen_LE],
            },
        }

    def vocabulary(self, kind: Kind) -> list[dict[str, float]]:
        """For every layer: the mean largest share, the same of a random routing, and how many ids counted."""
        rows = []
        for counts in self.census.words[kind]:
            _, count_nE = counts.rows()
            shares = measures.word_shares(count_nE, self.least)
            chance = measures.random_word_shares(count_nE, self.least)
            if len(shares):
                row = {
                    "share": float(shares.mean()),
                    "chance": float(chance.mean()),
                    "ids": float(len(shares)),
                }
            else:
                row = {"share": 0.0, "chance": 0.0, "ids": 0.0}
            rows.append(row)
        return rows

    def rows(self) -> list[tuple[str, str]]:
        """The summary that is printed: one line a quantity, first, middle and last layer."""
        numbers, census = self.as_json(), self.census
        shown = census.shown
        places = ", ".join(str(census.layers[n]) for n in shown)

        def of(values: Sequence[float], pattern: str = "{:.3f}") -> str:
            return ", ".join(pattern.format(values[n]) for n in shown)

        largest = [max(max(row) for row in layer) for layer in numbers["domain_shares"]]
        rows = [
            ("tokens", ", ".join(f"{name} {count:,}" for name, count in numbers["tokens"].items())),
            ("layers shown", places),
            ("load, busiest over mean", of(numbers["load"]["balance"], "{:.2f}")),
            ("dead experts", ", ".join(str(numbers["load"]["dead"][n]) for n in shown)),
            (
                "largest share of a domain",
                f"{of(largest)}  (uniform {numbers['experts_per_token'] / census.experts:.3f})",
            ),
            ("domain told by an expert, bits", of(numbers["domain_bits"])),
            (
                "most co-activated pair",
                f"{of([max(map(max, layer)) for layer in numbers['coactivation']])}  "
                f"(chance {numbers['chance']['coactivation']:.3f})",
            ),
        ]
        for kind in KINDS:
            row = numbers["vocabulary"][kind]
            chance = of([layer["chance"] for layer in row])
            rows.append((f"vocabulary, {kind} token", f"{of([x['share'] for x in row])}  (random {chance})"))
        if numbers["transition_bits"]:
            bits = [
                f"{numbers['transition_bits'][n]:.3f}" for n in shown[:-1]
            ]  # after the last there is none
            rows.append(("next layer told by an expert, bits", ", ".join(bits)))
        for label, pairs in numbers["saturation"].items():
            chances = numbers["chance"]
            rows.append(
                (
                    f"saturation of {label}",
                    f"top-{self.top_k} {of(pairs['top_k'])} (chance {chances['saturation']:.3f}); "
                    f"top-1 {of(pairs['top_1'])} (chance {chances['saturation_top1']:.3f})",
                )
            )
        return rows

    def write(self, folder: Path) -> list[Path]:
        """report.json and the figures, in ``folder``. Raises RecipeError, ResourceError."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"--out {folder}: cannot be made: {error.strerror}") from None
        numbers = self.as_json()
        write_atomic(folder / "report.json", json.dumps(numbers) + "\n")
        try:
            drawn = routing_plots.draw_all(numbers, self.census, folder)
        except OSError as error:
            raise RecipeError(f"--out {folder}: cannot be written: {error.strerror}") from None
        return [folder / "report.json", *drawn]


def analyse(
    models: Sequence[Path], data: Sequence[str], tokens: int, seq_len: int, least: int, say: Say
) -> Analysis:
    """Read the labelled text with every model. The last one is analysed, the others are its checkpoints; a
    run directory by itself stands for all of its checkpoints.

    Raises RecipeError, DataError, CheckpointError for models that are not of one kind.
    """
    paths = _checkpoints(models[0]) if len(models) == 1 else _labelled(models)
    label, path = paths[-1]
    lm = load(path)
    if not lm.config.moe_layers:
        raise RecipeError(f"{path}: is a dense model; it has no experts to analyse")
    seq_len = min(seq_len, lm.config.context)  # what lies past it, the model has never been trained on
    if tokens < seq_len:
        raise RecipeError(
            f"--tokens {tokens}: is less than one window; lower --seq-len, which is {seq_len} here"
        )
    windows = labelled_windows(lm, data, tokens, seq_len)
    last = choices(label, lm, windows, say)
    saturation = {}
    for name, earlier in paths[:-1]:
        other = load(earlier)
        if _kind(other) != _kind(lm):
            raise CheckpointError(
                f"{earlier}: is no checkpoint of the model in {path}; layers or experts differ"
            )
        before = choices(name, other, windows, say)
        k = last.chosen[0].shape[1]
        saturation[name] = [
            (measures.saturation(mine, its, k), measures.saturation(mine, its, 1))
            for mine, its in zip(before.chosen, last.chosen, strict=True)
        ]
    return Analysis(last.census, last.chosen[0].shape[1], least, saturation)


def labelled_windows(lm: LM, data: Sequence[str], tokens: int, seq_len: int) -> dict[str, Tensor]:
    """At most ``tokens`` tokens of each file ``NAME=FILE`` in full windows, int64 [N, T]."""
    windows: dict[str, Tensor] = {}
    template = load_template(lm.path)
    for word in data:
        name, equals, file = word.partition("=")
        if not equals or not name or name in windows:
            raise RecipeError(f"--data {word}: write NAME=FILE, each name once")
        ids: list[int] = []
        for example in read_examples(Path(file).expanduser(), name):
            ids += tokens_of(example, lm.tokenizer, template)[0].tolist()
            if len(ids) >= tokens:
                break
        whole = min(len(ids), tokens) // seq_len
        if not whole:
            raise DataError(f"{file}: has {len(ids):,} tokens, fewer than one window of {seq_len}")
        windows[name] = torch.tensor(ids[: whole * seq_len]).view(whole, seq_len)
    return windows


@torch.inference_mode()
def choices(label: str, lm: LM, windows: dict[str, Tensor], say: Say) -> Choices:
    """Run the text through one model; the last position of a window, after which nothing is known, counts for
    nothing."""
    config = lm.config
    census = Census(config.moe_layers, config.experts.count, list(windows), config.experts.names)
    chosen: list[list[Tensor]] = [[] for _ in config.moe_layers]
    for domain, (name, ids_NT) in enumerate(windows.items()):
        say(f"{label}: reading {ids_NT.numel():,} tokens of {name}")
        for ids_BT in ids_NT.split(max(1, _BATCH_TOKENS // ids_NT.shape[1])):
            output = lm.model(lm.to_device(ids_BT), logits=False)
            counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            counted_BT[:, -1] = False
            ids: dict[Kind, Tensor] = {
                "input": ids_BT.flatten(),
                "predicted": _predicted(lm, output.hidden_BTD.flatten(0, 1)),
                "true": ids_BT.roll(-1, dims=1).flatten(),
            }
            counted = counted_BT.flatten()
            census.add(domain, ids, counted, output.routings)
            for layer, routing in enumerate(output.routings):
                carried_out = routing.expert_TK.masked_fill(~routing.keep_TK, -1)
                chosen[layer].append(carried_out.cpu()[counted].to(torch.int16))
    return Choices(label, census, [torch.cat(parts) for parts in chosen])


def _predicted(lm: LM, hidden_TD: Tensor) -> Tensor:
    rows = max(1, _MOST_LOGITS // lm.config.vocabulary)
    return torch.cat([lm.model.lm_head(part).argmax(-1) for part in hidden_TD.split(rows)]).cpu()


def _labelled(models: Sequence[Path]) -> list[tuple[str, Path]]:
    """Models by the names of their folders, or by their paths where two have one name."""
    names = [path.name for path in models]
    return [(str(path) if names.count(path.name) > 1 else path.name, path) for path in models]


def _checkpoints(path: Path) -> list[tuple[str, Path]]:
    """The checkpoints of a run in order, its finished model last; of anything else, itself."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        return [(path.name, path)]
    steps = sorted((f for f in folder.glob("step-*") if re.fullmatch(r"step-\d+", f.name)), key=step_of)
    found = [(f"step {step_of(step):,}", step) for step in steps]
    if not (path / "model").is_dir():
        return found or [(path.name, path)]
    return [*found[:-1], (path.name, path)]


def _kind(lm: LM) -> tuple[int, int, int]:
    return len(lm.config.moe_layers), lm.config.experts.count, lm.config.vocabulary


def _nested(tensors: Iterable[Tensor]) -> list[Any]:
    return [[[round(x, 6) for x in row] for row in tensor.tolist()] for tensor in tensors]
