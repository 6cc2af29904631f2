"""What a merge is made of, and the steps by which models are made of it.

Every step is one merge or one run of the one loop, in a folder of its own under ``root``. Beside it stands a
key, a hash of all that decides it: what is there under the same key is taken as it is, what is there under
another is made again, and a run that was broken off goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console

from moesaic.config import validate
from moesaic.data.examples import ExampleStore
from moesaic.data.instructions import read_examples
from moesaic.data.pretrain import prepare
from moesaic.data.store import sha256_of
from moesaic.errors import RecipeError
from moesaic.export import export_model
from moesaic.files import write_atomic
from moesaic.merge.dense import write_average, write_dense
from moesaic.merge.donors import ADAPTER, open_donors
from moesaic.merge.merge import merge
from moesaic.merge.options import MergeOptions
from moesaic.train.loop import train
from moesaic.train.recipe import load_recipe

Say = Callable[[str], None]
_PROMPTS = 4


@dataclass(frozen=True)
class Parts:
    """A dense base, the experts tuned from it, and instruction data of each expert's role, by its name.

    ``prompts`` are what a user of mergekit would write for a role; of one that has none, the first questions
    of its data. ``merging`` are options of every merge, ``common`` overrides of every run. ``seq_len`` is
    where texts are cut.
    """

    root: Path
    base: Path
    experts: dict[str, Path]
    roles: dict[str, Path]
    prompts: dict[str, list[str]] = field(default_factory=dict)
    seed: int = 1337
    seq_len: int = 512
    common: list[str] = field(default_factory=list)
    merging: dict[str, object] = field(default_factory=dict)

    def options(self, **more: object) -> MergeOptions:
        """A merge of the experts. Raises RecipeError."""
        experts: dict[str, dict[str, Any]] = {}
        for role, model in self.experts.items():
            experts[role] = {"model": str(model), "positive": self._prompts_of(role)}
            if role in self.roles:
                experts[role]["calibration"] = str(self.roles[role])
        table = {"base": str(self.base), "experts": experts, "seed": self.seed, **self.merging, **more}
        return validate(MergeOptions, table, "merge")

    def merged(self, name: str, say: Say, **more: object) -> Path:
        """A merge of the experts under ``name``; ``more`` are options of a merge recipe."""
        options = self.options(**more)

        def make(out: Path) -> None:
            say(f"{name}: a merge of {len(self.experts)}")
            merge(options, out, lambda _: None)

        return self._made(name, [options.model_dump(mode="json"), *self._donors()], make)

    def stage(self, name: str, recipe: str, start: Path | None, steps: int, say: Say, *more: str) -> Path:
        """One run of the loop on the data of all roles, exported to ``name``; ``more`` are overrides, over
        which ``common`` has the last word."""
        run = self.root / "runs" / name
        words = [f"seed={self.seed}", f"out={run}", f"train.steps={steps}", f"train.seq_len={self.seq_len}"]
        words += [f"eval.every={steps}", f"checkpoint.every={max(1, min(steps, 200))}"]
        words += [] if any(m.startswith("data.path=") for m in more) else [self._paths()]
        words += [f"start={start}"] if start is not None else []
        words += [*more, *self.common]

        def make(out: Path) -> None:
            say(f"{name}: {steps} steps")
            broken_off = (run / "recipe.toml").exists()
            chosen = load_recipe(
                str(run) if broken_off else recipe, [] if broken_off else words, resume=broken_off
            )
            train(chosen, resume=broken_off, console=Console(quiet=True))
            export_model(run, out)

        identity = [recipe, words, *([_identity(start)] if start is not None else [])]
        return self._made(name, [*identity, *map(_identity, self.roles.values())], make, run)

    def dense_experts(self, say: Say) -> dict[str, Path]:
        """Every expert as a whole model: an adapter is applied to the base."""
        adapters = [role for role, path in self.experts.items() if (path / ADAPTER).exists()]
        if not adapters:
            return self.experts
        _, donors = open_donors(self.options(router={"init": "zero"}))
        whole = dict(self.experts)
        for donor in donors:
            if donor.name in adapters:
                identity = [_identity(self.base), _identity(donor.directory)]
                say(f"{donor.name}: applying the adapter")

                def make(out: Path, donor: Any = donor) -> None:
                    write_dense(donor, out)

                whole[donor.name] = self._made(f"whole-{donor.name}", identity, make)
        return whole

    def soup(self) -> Path:
        """The uniform average of the experts, every tensor of it."""
        base, donors = open_donors(self.options(router={"init": "zero"}))
        return self._made("soup", self._donors(), lambda out: write_average(base, donors, out))

    def store(self) -> ExampleStore:
        """The examples of every role, those held out that no stage has trained on."""
        recipe = load_recipe("router", [f"start={self.base}", self._paths(), *self.common])
        store = prepare(recipe.data, seq_len=self.seq_len)
        assert isinstance(store, ExampleStore)
        return store

    def derived(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that ``make`` writes from the base alone."""
        return self._made(name, [_identity(self.base), self.seed], make)

    def _made(
        self, name: str, identity: list[Any], make: Callable[[Path], None], run: Path | None = None
    ) -> Path:
        """The folder ``name``, made unless it is there under the same key. Raises RecipeError where something
        that was not made here is in the way."""
        out, mark = self.root / name, self.root / f"{name}.key"
        key = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
        known = mark.read_text(encoding="utf-8") if mark.is_file() else None
        if out.exists() and known == key:
            return out
        for found in (out, *([run] if run is not None else [])):
            if known is None and found.exists():
                raise RecipeError(
                    f"{found}: is in the way; it was not made here. Choose another folder to work in"
                )
        if known != key:  # of other parts: made again from the beginning
            for old in (out, *([run] if run is not None else [])):
                shutil.rmtree(old, ignore_errors=True)
        self.root.mkdir(parents=True, exist_ok=True)
        write_atomic(mark, key)
        make(out)
        return out

    def _donors(self) -> list[Any]:
        return [_identity(path) for path in (self.base, *self.experts.values(), *self.roles.values())]

    def _prompts_of(self, role: str) -> list[str]:
        if role in self.prompts or role not in self.roles:
            return self.prompts.get(role, [])
        examples = islice(read_examples(self.roles[role], role), _PROMPTS)
        first = [e.messages[0]["content"] if e.messages else e.text[:200] for e in examples]
        return [prompt for prompt in first if prompt.strip()]

    def _paths(self) -> str:
        """The override that names the data; as a table, since a role's name may hold a dot."""
        pairs = (f"{json.dumps(role)} = {json.dumps(str(file))}" for role, file in self.roles.items())
        return f"data.path={{{', '.join(pairs)}}}"


def _identity(path: Path) -> list[Any]:
    """What tells a file by its content, a model's folder by its files' names, sizes and dates."""
    if path.is_file():
        return [str(path), sha256_of(path)]
    found = [file for file in sorted(path.glob("*")) if file.is_file() and file.name != "README.md"]
    return [str(path), *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in found)]
