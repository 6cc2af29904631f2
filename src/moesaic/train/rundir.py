"""A run directory: what it holds, who may open it, and how its metrics are read and cut back.

recipe.toml  env.json  metrics.jsonl  load.jsonl  checkpoints/step-…/  latest  plots/  model/
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesaic.config import dump_toml, read_toml, validate
from moesaic.errors import DataError, RecipeError, ResourceError
from moesaic.files import free_bytes, human_size, write_atomic
from moesaic.machine import describe
from moesaic.train.recipe import Recipe

# A resumed run must be the same run; only what does not touch the weights' path may change.
_MAY_CHANGE = [
    *("out", "name", "about", "tracker", "eval", "checkpoint", "data.cache"),
    *(
        "train.steps",
        "train.epochs",
        "offload.memory",
        "offload.threads",
        "train.device",
        "train.log_every",
        "train.on_nan",
    ),
    "model.vocab_size",  # which a recipe may leave to the tokenizer
]

# What a process that is killed before recipe.toml is in place leaves behind.
_BEFORE_A_RUN = re.compile(r"\.lock|experts|env\.json|\.(env\.json|recipe\.toml)\.tmp-\d+")


def choose_directory(recipe: Recipe, resume: bool) -> Path:
    """The directory of a run. Raises RecipeError where it holds something else, or nothing to resume.

    Without ``out``: runs/NAME, or the next free runs/NAME-2 …; to resume, the newest of those.
    """
    if recipe.out is not None:
        return _checked(Path(recipe.out).expanduser(), resume)
    numbered = [Path("runs") / (recipe.name if n == 1 else f"{recipe.name}-{n}") for n in range(1, 10_000)]
    if resume:
        runs = [path for path in numbered if (path / "recipe.toml").is_file()]
        if not runs:
            raise RecipeError(f"runs/{recipe.name}: no run to resume; name it with out=DIR")
        return runs[-1]
    return next(path for path in numbered if _is_free(path))


def _checked(path: Path, resume: bool) -> Path:
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file; out must name a directory")
    is_run = (path / "recipe.toml").is_file()
    if resume and not is_run:
        raise RecipeError(f"{path}: holds no run to resume (no recipe.toml)")
    if is_run and not resume:
        raise RecipeError(
            f"{path}: already holds a run; add --resume to continue it or choose another out=DIR"
        )
    if not is_run and not _is_free(path):
        raise RecipeError(f"{path}: is not empty and is no run; choose another out=DIR")
    return path


def check_room(path: Path, needed: int) -> None:
    """Raise where the run directory ``path`` could not be made, or lacks ``needed`` bytes of room."""
    there = next(p for p in [path, *path.absolute().parents] if p.exists())
    if not os.access(there, os.W_OK):
        raise RecipeError(f"{path}: {there} cannot be written to; choose another out=DIR")
    if free_bytes(there) < needed:
        raise ResourceError(
            f"{path}: the run needs {human_size(needed)} and {there} has {human_size(free_bytes(there))} "
            "free; make room, choose another out=DIR, or lower checkpoint.keep or, with experts on disk, "
            "checkpoint.every"
        )


def _is_free(path: Path) -> bool:
    """Whether nothing is there but what a start that failed or was killed leaves behind."""
    if not path.exists():
        return True
    return path.is_dir() and all(_BEFORE_A_RUN.fullmatch(p.name) for p in path.iterdir())


def create(path: Path, recipe: Recipe) -> None:
    """Write recipe.toml (resolved) and env.json. The recipe comes last: it makes a directory a run."""
    write_atomic(path / "env.json", json.dumps(describe(), indent=2) + "\n")
    write_atomic(path / "recipe.toml", dump_toml(recipe))


def stored_recipe(path: Path) -> Recipe:
    """The recipe that the run in ``path`` was last started with."""
    return validate(Recipe, read_toml(path / "recipe.toml"), where=str(path / "recipe.toml"))


def check_same_run(stored: Recipe, given: Recipe, path: Path) -> None:
    """Raise RecipeError where ``given`` would continue ``stored`` as a different run.

    ``train.steps`` may grow or shrink; anything else that the weights depend on may not.
    """
    before, after = stored.model_dump(mode="json"), given.model_dump(mode="json")
    for table in (before, after):
        for name in _MAY_CHANGE:
            part, _, key = name.rpartition(".")
            (table[part] if part else table).pop(key)
    changed = sorted(_differences(before, after))
    if (stored.offload.memory is None) != (given.offload.memory is None):
        changed.append("offload.memory (experts that are in memory stay there, and those on disk too)")
    if changed:
        raise RecipeError(
            f"{path}: --resume continues the same run, but these keys differ from its recipe.toml: "
            f"{', '.join(changed)}; start a new run with another out=DIR"
        )


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before.keys() | after.keys():
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
    elif before != after:
        yield prefix


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL log. A torn last line (a crash while writing) is passed over.

    Raises DataError for a broken line elsewhere.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not a JSON row") from None
    return rows


def cut_rows(path: Path, step: int) -> None:
    """Drop the rows of steps after ``step``: a resumed run makes them again."""
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= step]
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
