"""One merge from beginning to end: check, fit the router, write."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.config import dump_toml
from moesaic.data.chat import load_template
from moesaic.data.instructions import read_examples, tokens_of
from moesaic.errors import DataError, RecipeError, ResourceError
from moesaic.files import free_bytes, human_size
from moesaic.machine import available_memory, return_freed_memory
from moesaic.merge.donors import Donor, open_donors, user_path, widest
from moesaic.merge.options import MergeOptions, RouterMode
from moesaic.merge.router_fit import Calibration, fit_router, labelled, prompted, unlabelled
from moesaic.merge.tensors import Merged, target_of
from moesaic.model.config import ModelConfig
from moesaic.weights.carried import MERGE, carried_files
from moesaic.weights.families import Family
from moesaic.weights.hf import write_tensors
from moesaic.weights.manifest import CARD
from moesaic.weights.shards import read_json_file, real_file

Say = Callable[[str], None]
_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0)  # between base and average, of shared = auto


@dataclass(frozen=True)
class Plan:
    """A merge that has been checked and of which nothing has been read but headers."""

    options: MergeOptions
    base: Donor
    experts: list[Donor]
    family: Family
    config: ModelConfig
    dtype: torch.dtype
    mode: RouterMode

    @property
    def bytes(self) -> int:
        """On disk."""
        return self.config.parameters().total * self.dtype.itemsize

    def notes(self) -> list[str]:
        """What the reader should know: what was reconciled, and what a merge leaves behind."""
        notes = [f"{donor.name}: {note}" for donor in (self.base, *self.experts) for note in donor.notes]
        words = {donor.name: donor.found.config.vocabulary for donor in (self.base, *self.experts)}
        if len(set(words.values())) > 1:
            kept = self.config.vocabulary
            notes.append(
                f"vocabularies of {', '.join(f'{v:,} ({n})' for n, v in words.items())}: {kept:,} kept"
            )
        if not self.options.renormalize:
            notes.append("weights are not renormalised: it is not its donors until it has been trained")
        if self.mode == "random":
            notes.append("the router is random: it knows nothing of the experts until it is trained")
        return notes

    def rows(self) -> list[tuple[str, str]]:
        """What ``--dry-run`` prints."""
        counts, config, options = self.config.parameters(), self.config, self.options
        router = config.router.parameters(config.width, config.experts.count) * len(config.moe_layers)
        names = ", ".join(donor.name for donor in self.experts)
        return [
            ("architecture", f"{self.family.architecture}, from {self.base.found.family.architecture}"),
            ("experts", f"{len(self.experts)}: {names}; {options.top_k} per token"),
            ("shape", f"{config.layers} layers, width {config.width}, FFN {config.experts.hidden}"),
            ("vocabulary", f"{config.vocabulary:,}{', tied' if config.tied else ''}"),
            ("parameters", f"{counts.total:,} in all, {counts.active:,} active, router {router:,}"),
            ("shared weights", options.shared),
            ("router", self.mode),
            ("on disk", f"{human_size(self.bytes)} in {str(self.dtype).removeprefix('torch.')}"),
            ("memory", f"about {human_size(self.memory())}"),
            *(("note", note) for note in self.notes()),
        ]

    def memory(self) -> int:
        """About how much is held at once: a layer and the hidden states of the text, or a few tensors."""
        config = self.config
        largest = config.vocabulary * config.width * 4 * 3
        if self.mode in ("random", "zero"):
            return largest
        layer = config.experts.count * config.experts.parameters(config.width) * 8
        texts = sum(bool(source.calibration) for source in self.options.experts.values()) or 1
        states = 2 * texts * self.options.router.tokens * config.width * 4
        dense = self.base.found.config.parameters().total * 4 if self.mode == "ridge-unlabelled" else 0
        return largest + max(layer + states, dense)


def plan_merge(options: MergeOptions) -> Plan:
    """Check everything and touch nothing. Raises RecipeError, CheckpointError, a line per problem."""
    mode = options.router_mode()
    base, experts = open_donors(options)
    family, config = target_of(base, experts, options)
    dtype = getattr(torch, options.dtype) if options.dtype else widest([base, *experts])
    return Plan(options, base, experts, family, config, dtype, mode)


def merge(options: MergeOptions, out: Path, say: Say, *, overwrite: bool = False) -> Plan:
    """Write the merge to ``out``, a directory that stock ``transformers`` opens. ``out`` appears whole or not
    at all, and one that exists is replaced only with ``overwrite``.

    Raises the errors of ``plan_merge``, DataError for calibration text, ResourceError where disk or memory is
    too small.
    """
    plan, out = plan_merge(options), out.expanduser().absolute()
    for donor in (plan.base, *plan.experts):
        if donor.directory.resolve().is_relative_to(out.resolve()):
            raise RecipeError(f"{out}: {donor.name} is in there; choose another name")
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise RecipeError(f"{out}: exists; choose another name, or say --overwrite to replace it")
    _check_room(plan, out)
    return_freed_memory()
    for note in plan.notes():
        say(note)
    merged = Merged(plan.base, plan.experts, options, plan.family, plan.config)
    loss = _make_router(plan, merged, say)
    say(f"writing {human_size(plan.bytes)} to {out}")
    speaker = _speaker(plan, merged)
    files = carried_files(speaker.directory)
    if speaker.tokenizer is not None:
        files["tokenizer.json"] = real_file(speaker.directory / "tokenizer.json").read_bytes()
    files |= {CARD: _card(plan, out.name, loss).encode(), MERGE: dump_toml(options).encode()}
    extra = _special_ids(plan.base) | _special_ids(speaker)
    write_tensors(out, plan.config, plan.family, merged.on_disk(plan.dtype), plan.dtype, files, extra)
    return plan


def _speaker(plan: Plan, merged: Merged) -> Donor:
    """Whose tokenizer and chat template the merge has."""
    return merged.owner if merged.owner.tokenizer is not None else plan.base


def _special_ids(donor: Donor) -> dict[str, Any]:
    """The ids of special tokens, by generation_config.json or config.json."""
    ids: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        if (donor.directory / name).exists():
            table = read_json_file(donor.directory / name)
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                if key not in ids and isinstance(table, dict) and table.get(key) is not None:
                    ids[key] = table[key]
    return ids


def _check_room(plan: Plan, out: Path) -> None:
    free, needed = available_memory(), plan.memory()
    if free is not None and needed > free:
        raise ResourceError(
            f"the merge takes about {human_size(needed)} of memory, {human_size(free)} are free"
        )
    parent = next(p for p in (out.absolute().parent, *out.absolute().parents) if p.exists())
    if (room := free_bytes(parent)) < plan.bytes:
        raise ResourceError(
            f"{out}: the merge takes {human_size(plan.bytes)}, {human_size(room)} are free there"
        )


def _make_router(plan: Plan, merged: Merged, say: Say) -> float | None:
    """Fill ``merged.router_ED``; the loss on the calibration text where one was measured."""
    options, config = plan.options, plan.config
    E, D = config.experts.count, config.width
    if plan.mode in ("random", "zero"):
        std = 0.0 if plan.mode == "zero" else options.router.std
        generator = torch.Generator().manual_seed(options.seed)
        for layer in range(config.layers):
            merged.router_ED[layer] = std * torch.randn(E, D, generator=generator)
        return None
    speaker = _speaker(plan, merged)
    if speaker.tokenizer is None:
        raise RecipeError(
            f"router.init = {plan.mode}: {plan.base.directory} has no tokenizer.json to read text with"
        )
    calibration = _calibration(plan, speaker, say)
    if options.shared != "auto":
        loss = fit_router(merged, calibration, plan.mode, options.router, say)
    else:
        losses = {}
        for step in _STEPS:
            merged.average = step
            losses[step] = fit_router(merged, calibration, plan.mode, options.router, lambda _: None)
            say(f"shared: {step:.2f} of the way from base to average: loss {losses[step]:.4f}")
        merged.average = min(losses, key=lambda step: losses[step])
        loss = fit_router(merged, calibration, plan.mode, options.router, say)
    if plan.mode == "prompts":  # which are no text to have a loss on
        return None
    say(f"loss on the calibration text: {loss:.4f} nats per token")
    return loss


def _calibration(plan: Plan, speaker: Donor, say: Say) -> Calibration:
    """The text that the router is fitted to, as the mode wants it. Raises DataError."""
    assert speaker.tokenizer is not None
    encode, sources = speaker.tokenizer.encode, plan.options.experts
    if plan.mode == "prompts":
        coded = []
        for name, source in sources.items():
            both = [
                [torch.from_numpy(encode(text, special=True)).long() for text in texts if text]
                for texts in (source.positive, source.negative)
            ]
            for ids in (*both[0], *both[1]):
                _check_ids(ids, plan, f"{name}: a prompt")
            coded.append((both[0], both[1]))
        return prompted(coded)
    texts = {name: _text_ids(plan, name, speaker) for name, source in sources.items() if source.calibration}
    length = min(plan.options.router.seq_len, plan.config.context, *(len(ids) for ids in texts.values()))
    if length < 2:
        shortest = min(texts, key=lambda name: len(texts[name]))
        raise DataError(f"{shortest}: its calibration text has {len(texts[shortest])} tokens; give more")
    windows = [ids[: len(ids) // length * length].view(-1, length) for ids in texts.values()]
    if plan.mode == "ridge":
        return labelled(windows)
    return unlabelled(plan.experts, torch.cat(windows), say)


def _text_ids(plan: Plan, name: str, speaker: Donor) -> Tensor:
    """The first ``router.tokens`` tokens of an expert's calibration text."""
    assert speaker.tokenizer is not None
    most, template = plan.options.router.tokens, load_template(speaker.directory)
    pieces: list[list[int]] = []
    size = 0
    files = [Path(file) for file in plan.options.experts[name].calibration]
    for example in chain.from_iterable(read_examples(user_path(file)) for file in files):
        ids, _ = tokens_of(example, speaker.tokenizer, template)
        pieces.append(ids.tolist())
        size += len(ids)
        if size >= most:
            break
    flat = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64)[:most]
    _check_ids(flat, plan, f"{name}: its calibration text")
    return flat


def _check_ids(ids: Tensor, plan: Plan, what: str) -> None:
    if len(ids) and int(ids.max()) >= plan.config.vocabulary:
        raise DataError(f"{what} has token {int(ids.max())}, and the model {plan.config.vocabulary} of them")


def _card(plan: Plan, title: str, loss: float | None) -> str:
    """A README.md: what went in, and how. Facts only."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in plan.rows() if name not in ("memory", "note"))
    sources = "\n".join(f"| {d.name} | `{d.directory.name}` |" for d in (plan.base, *plan.experts))
    measured = "" if loss is None else f"| loss on the calibration text | {loss:.4f} nats per token |\n"
    return f"""---
library_name: transformers
tags: [mixture-of-experts, merge, moesaic]
---

# {title}

A mixture of experts merged by moesaic from dense models that were tuned from one base.

| | |
|---|---|
{rows}
{measured}
| expert | from |
|---|---|
{sources}

It opens in stock `transformers`, vLLM and llama.cpp as any {plan.family.architecture} does. It has no licence
of its own: those of the models it was made from apply.
"""
