"""A merge from nothing: a base, an expert of each role, the merge, its router, and the proof.

Every stage is a run of the one loop or one merge, in a folder of its own under ``root``; one that is there
already is not made again. ``benchmarks/merge_roles.py`` and ``moesaic demo-merge`` are this with other roles
and sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from moesaic.analysis.compare import Comparison, Losses, held_out, losses_of, oracle, switching
from moesaic.data.examples import ExampleStore
from moesaic.data.instructions import read_examples
from moesaic.data.pretrain import prepare
from moesaic.data.tokenizers import Tokenizer
from moesaic.export import export_model
from moesaic.lm import load
from moesaic.merge.merge import merge
from moesaic.merge.options import MergeOptions
from moesaic.model.transformer import LanguageModel
from moesaic.train.loop import train
from moesaic.train.recipe import load_recipe

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
OURS, BASE, ORACLE, SOUP = "merge + router + shared", "base", "oracle (own expert)", "average (soup)"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Chain:
    """What is made of which files, how long each stage is. ``networks_only``: experts are tuned in their
    feed-forward networks alone, which merges best; else in everything, as experts found elsewhere are."""

    root: Path
    roles: dict[str, Path]
    seed: int = 1337
    networks_only: bool = False
    base_steps: int = 1000
    expert_steps: int = 120
    router_steps: int = 80
    shared_steps: int = 240
    seq_len: int = 192
    vocab_size: int = 2048
    lr: float = 1e-3
    common: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What of an expert was tuned; the same base serves both."""
        return "networks" if self.networks_only else "whole"

    def run(self, say: Say) -> dict[str, Path]:
        """Make base, experts, the merge and its stages; the directories by name."""
        made = {BASE: self.base(say)}
        for role in self.roles:
            made[role] = self.expert(role, say)
        made["merge"] = self.merged("merge", say, shared="base", router={"init": "ridge", "seq_len": 128})
        router, shared = f"{self.kind}-router", f"{self.kind}-shared"
        made["merge + router"] = self.stage(router, "router", made["merge"], self.router_steps, say)
        more = self._lr()
        made[OURS] = self.stage(shared, "shared", made["merge + router"], self.shared_steps, say, more)
        return made

    def base(self, say: Say) -> Path:
        """The dense model that all experts are tuned from, with a tokenizer of its own."""
        tokenizer, template = self.root / "tokenizer.json", self.root / "chat_template.jinja"
        if not tokenizer.exists():
            self.root.mkdir(parents=True, exist_ok=True)
            examples = [e for file in self.roles.values() for e in read_examples(file)]
            texts = [m["content"] for e in examples for m in e.messages] + [
                e.text for e in examples if e.text
            ]
            Tokenizer.bpe(texts, self.vocab_size).save(tokenizer)
            template.write_text(TEMPLATE, encoding="utf-8")
        data = [f"data.tokenizer={tokenizer}", f"data.template={template}"]
        return self.stage("base", "llama-tiny", None, self.base_steps, say, data)

    def expert(self, role: str, say: Say) -> Path:
        """The base tuned on one role."""
        which = [] if self.networks_only else ["train.only=[]"]
        data = [*self._lr(), *which, f"data.path={{{role} = {str(self.roles[role])!r}}}"]
        return self.stage(
            f"{self.kind}-{role}", "expert", self.root / "base", self.expert_steps, say, data, False
        )

    def merged(self, name: str, say: Say, **options: object) -> Path:
        """A merge of the experts under ``name``."""
        out = self.root / f"{self.kind}-{name}"
        if not out.exists():
            experts = {
                role: {
                    "model": str(self.root / f"{self.kind}-{role}"),
                    "calibration": str(file),
                    **_PROMPTS.get(role, {}),
                }
                for role, file in self.roles.items()
            }
            table = {"base": str(self.root / "base"), "experts": experts, "seed": self.seed, **options}
            merge(MergeOptions.model_validate(table), out, say)
        return out

    def stage(
        self,
        name: str,
        recipe: str,
        start: Path | None,
        steps: int,
        say: Say,
        more: list[str] | None = None,
        all_roles: bool = True,
    ) -> Path:
        """One run of the loop, exported to ``name``."""
        out = self.root / name
        if out.exists():
            return out
        say(f"{name}: {steps} steps")
        words = [f"seed={self.seed}", f"out={self.root / 'runs' / name}", f"train.steps={steps}"]
        words += [f"train.seq_len={self.seq_len}", f"eval.every={steps}", f"checkpoint.every={steps}"]
        words += [f"data.path.{role}={file}" for role, file in self.roles.items()] if all_roles else []
        words += [f"start={start}"] if start is not None else []
        train(load_recipe(recipe, [*words, *self.common, *(more or [])]), console=_quiet())
        export_model(self.root / "runs" / name, out)
        return out

    def soup(self, say: Say) -> LanguageModel:
        """The uniform average of the experts, every tensor of it."""
        experts = [load(self.root / f"{self.kind}-{role}").model.state_dict() for role in self.roles]
        model = load(self.root / "base").model
        say("averaging the experts")
        model.load_state_dict({k: torch.stack([e[k] for e in experts]).mean(0) for k in experts[0]})
        return model

    def store(self) -> ExampleStore:
        """The examples of every role, the held-out ones those that no stage has trained on."""
        words = [f"data.path.{role}={file}" for role, file in self.roles.items()]
        recipe = load_recipe("router", [f"start={self.root / 'base'}", *words])
        store = prepare(recipe.data, seq_len=self.seq_len)
        assert isinstance(store, ExampleStore)
        return store

    def _lr(self) -> list[str]:
        return [f"optim.lr={self.lr}"]


# What a user of mergekit would write for the eight roles.
_PROMPTS = {
    "actor": {"positive": ["Let us continue this conversation.", "What do you think about that movie?"]},
    "analyst": {"positive": ["Write an SQL query for this question.", "SELECT name FROM table WHERE"]},
    "coder": {"positive": ["Write a Python function.", "def function(argument): return"]},
    "encyclopedia": {"positive": ["Write an encyclopedia paragraph.", "The history of the town began in"]},
    "guardian": {"positive": ["Is it safe and legal to do this?", "I cannot help with something harmful."]},
    "summarizer": {"positive": ["Summarize this paragraph.", "In one sentence, this text says"]},
    "thinker": {"positive": ["Solve this math problem step by step.", "How many apples are left in total?"]},
    "writer": {"positive": ["Write a speech for a character.", "My lord, I do beseech you, hear me speak."]},
}


def prove(chain: Chain, models: dict[str, Path | LanguageModel], say: Say) -> tuple[Comparison, Comparison]:
    """Every model on the held-out documents of each role, and on documents that switch from one to
    another."""
    store = chain.store()
    documents, changing = held_out(store), switching(store, chain.seq_len)
    losses: dict[str, Losses] = {}
    switches: dict[str, Losses] = {}
    for name, model in models.items():
        say(f"measuring {name}")
        network = model if isinstance(model, LanguageModel) else load(model).model
        losses[name] = losses_of(network, documents, chain.seq_len)
        switches[name] = losses_of(network, changing, chain.seq_len)
    losses[ORACLE] = oracle(documents, losses, {role: role for role in chain.roles})
    return Comparison(documents, BASE, losses), Comparison(changing, BASE, switches)


def _quiet() -> Console:
    return Console(quiet=True)
