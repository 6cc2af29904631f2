"""What a merge is made of, and the steps by which models are made of it.

Every step is one merge or one run of the one loop, in a folder of its own under ``root``; one that is there
already is not made again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from moesaic.data.examples import ExampleStore
from moesaic.data.instructions import read_examples
from moesaic.data.pretrain import prepare
from moesaic.export import export_model
from moesaic.lm import load
from moesaic.merge.merge import merge
from moesaic.merge.options import MergeOptions
from moesaic.model.transformer import LanguageModel
from moesaic.train.loop import train
from moesaic.train.recipe import load_recipe

Say = Callable[[str], None]
_PROMPTS = 4


@dataclass(frozen=True)
class Parts:
    """A dense base, the experts tuned from it, and instruction data of each expert's role, by its name.

    ``prompts`` are what a user of mergekit would write for a role; of one that has none, the first questions
    of its data. ``seq_len`` is where texts are cut; ``common`` are overrides of every run.
    """

    root: Path
    base: Path
    experts: dict[str, Path]
    roles: dict[str, Path]
    prompts: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 1337
    seq_len: int = 512
    common: list[str] = field(default_factory=list)

    def merged(self, name: str, say: Say, **options: object) -> Path:
        """A merge of the experts under ``name``; ``options`` are those of a merge recipe."""
        out = self.root / name
        if out.exists():
            return out
        experts = {}
        for role, model in self.experts.items():
            text = {"calibration": str(self.roles[role])} if role in self.roles else {}
            experts[role] = {"model": str(model), "positive": self._prompts_of(role), **text}
        table = {"base": str(self.base), "experts": experts, "seed": self.seed, **options}
        say(f"{name}: a merge of {len(experts)}")
        merge(MergeOptions.model_validate(table), out, lambda _: None)
        return out

    def stage(self, name: str, recipe: str, start: Path | None, steps: int, say: Say, *more: str) -> Path:
        """One run of the loop on the data of all roles, exported to ``name``; ``more`` are overrides."""
        out = self.root / name
        if out.exists():
            return out
        say(f"{name}: {steps} steps")
        run = self.root / "runs" / name
        words = [f"seed={self.seed}", f"out={run}", f"train.steps={steps}", f"train.seq_len={self.seq_len}"]
        words += [f"eval.every={steps}", f"checkpoint.every={steps}"]
        words += [] if any(m.startswith("data.path=") for m in more) else self._paths()
        words += [f"start={start}"] if start is not None else []
        train(load_recipe(recipe, [*words, *self.common, *more]), console=Console(quiet=True))
        export_model(run, out)
        return out

    def soup(self) -> LanguageModel:
        """The uniform average of the experts, every tensor of it."""
        model = load(self.base).model
        mean = {
            name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in model.state_dict().items()
        }
        for expert in self.experts.values():
            for name, tensor in load(expert).model.state_dict().items():
                mean[name] += tensor.float() / len(self.experts)
        model.load_state_dict(mean)
        return model

    def store(self) -> ExampleStore:
        """The examples of every role, those held out that no stage has trained on."""
        recipe = load_recipe("router", [f"start={self.base}", *self._paths()])
        store = prepare(recipe.data, seq_len=self.seq_len)
        assert isinstance(store, ExampleStore)
        return store

    def _prompts_of(self, role: str) -> list[str]:
        if role in self.prompts or role not in self.roles:
            return self.prompts.get(role, [])
        examples = islice(read_examples(self.roles[role]), _PROMPTS)
        return [e.messages[0]["content"] if e.messages else e.text[:200] for e in examples]

    def _paths(self) -> list[str]:
        return [f"data.path.{role}={file}" for role, file in self.roles.items()]
