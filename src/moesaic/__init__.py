"""Build, train and inspect sparse mixture-of-experts language models.

import moesaic

run = moesaic.run("demo", ["train.steps=200", "out=runs/first"])
lm = moesaic.load(run)
print(lm.generate("def main(", max_new_tokens=80, temperature=0.8, seed=0))
for layer, routing in enumerate(lm.routing(lm.ids("def main("))):
    print(layer, routing.counts_E().tolist())
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.lm import LM as LM
    from moesaic.lm import load as load
    from moesaic.routing import Routing as Routing
    from moesaic.train.loop import run as run
    from moesaic.train.recipe import Recipe as Recipe

# Read once by PyTorch when it first allocates: large tensors on huge pages. It saves a page fault
# per 4 KiB of every fresh activation; what it buys a whole step was lost in this machine's noise.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Imported on first use, so that ``moesaic --help`` needs no torch.
_HOME = {
    "LM": "moesaic.lm",
    "Recipe": "moesaic.train.recipe",
    "Routing": "moesaic.routing",
    "load": "moesaic.lm",
    "run": "moesaic.train.loop",
}

__all__ = ["LM", "Recipe", "Routing", "load", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
