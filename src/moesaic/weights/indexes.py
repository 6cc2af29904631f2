"""What the checkpoints of a run say of its experts on disk."""

from contextlib import suppress
from pathlib import Path

from moesaic.errors import CheckpointError
from moesaic.offload.store import INDEX, Index
from moesaic.weights.checkpoint import read_tensors


def indexes(run: Path) -> dict[Path, Index]:
    """The index of every checkpoint of a run, those included that stepped aside while they were replaced, and
    of its finished model: no record that one of them refers to may be written over. A damaged one is left
    out, for nobody can go back to it."""
    checkpoints = run / "checkpoints"
    found = {}
    for path in [*checkpoints.glob("step-*"), *checkpoints.glob(".step-*.old-*"), run / "model"]:
        with suppress(CheckpointError, OSError):
            found[path] = Index.of(read_tensors(path, INDEX))
    return found
