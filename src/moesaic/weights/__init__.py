"""Weights at rest: checkpoints, and the formats of others."""

from moesaic.weights.checkpoint import (
    CheckpointOptions,
    newest_valid,
    read_checkpoint,
    read_json,
    read_tensors,
    save,
    step_of,
    write_checkpoint,
)
from moesaic.weights.contents import Contents
from moesaic.weights.manifest import verify

__all__ = [
    "CheckpointOptions",
    "Contents",
    "newest_valid",
    "read_checkpoint",
    "read_json",
    "read_tensors",
    "save",
    "step_of",
    "verify",
    "write_checkpoint",
]
