"""Build, train and inspect sparse mixture-of-experts language models.

import moesaic

run = moesaic.run("demo", ["train.steps=200", "out=runs/first"])
lm = moesaic.load(run)
print(lm.generate("def main(", max_new_tokens=80, temperature=0.8, seed=0))
for layer, routing in enumerate(lm.routing(lm.ids("def main("))):
    print(layer, routing.counts_E().tolist())

What the command line does has a name here too: ``run`` (train), ``dry_run``, ``bench``, ``route_prompt``
(inspect), ``export_model`` (export), ``builtin_recipes`` and ``load_recipe`` (recipes), ``describe`` (env),
and the methods of ``LM``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.analysis.prompt import route_prompt as route_prompt
    from moesaic.export import export_model as export_model
    from moesaic.lm import LM as LM
    from moesaic.lm import load as load
    from moesaic.machine import describe as describe
    from moesaic.routing import Routing as Routing
    from moesaic.train.loop import run as run
    from moesaic.train.measure import bench as bench
    from moesaic.train.measure import dry_run as dry_run
    from moesaic.train.recipe import Recipe as Recipe
    from moesaic.train.recipe import builtin_recipes as builtin_recipes
    from moesaic.train.recipe import load_recipe as load_recipe

# Read once by PyTorch when it first allocates: large tensors on huge pages. It saves a page fault
# per 4 KiB of every fresh activation; what it buys a whole step was lost in this machine's noise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Imported on first use, so that ``moesaic --help`` needs no torch.
_HOME = {
    "LM": "moesaic.lm",
    "Recipe": "moesaic.train.recipe",
    "Routing": "moesaic.routing",
    "bench": "moesaic.train.measure",
    "builtin_recipes": "moesaic.train.recipe",
    "describe": "moesaic.machine",
    "dry_run": "moesaic.train.measure",
    "export_model": "moesaic.export",
    "load": "moesaic.lm",
    "load_recipe": "moesaic.train.recipe",
    "route_prompt": "moesaic.analysis.prompt",
    "run": "moesaic.train.loop",
}

__all__ = [
    "LM",
    "Recipe",
    "Routing",
    "bench",
    "builtin_recipes",
    "describe",
    "dry_run",
    "export_model",
    "load",
    "load_recipe",
    "route_prompt",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
