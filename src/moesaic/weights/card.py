"""The model card, README.md: for people, who may edit it, so no checksum is kept of it."""

import os
from pathlib import Path

from moesaic.errors import CheckpointError
from moesaic.files import explained, write_atomic
from moesaic.weights.manifest import CARD
from moesaic.weights.shards import real_file

_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_measured(directory: Path, text: str) -> None:
    """Put what was measured of a model into its card, in place of what an earlier measurement put there.

    Raises CheckpointError for a card that is no text, ResourceError and RecipeError where it cannot be
    written."""
    path = directory / CARD
    card = f"# {directory.name}\n"
    if os.path.lexists(path):
        try:
            card = real_file(path).read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{path}: is not UTF-8 text; move it away") from None
    before, begun, rest = card.partition(_BEGIN)
    if begun and _END not in rest:
        raise CheckpointError(f"{path}: has {_BEGIN!r} and no {_END!r} after it; put it back, or remove both")
    after = rest.partition(_END)[2]
    section = f"{_BEGIN}\n## Measured\n\n{text.strip()}\n{_END}"
    whole = f"{before.rstrip()}\n\n{section}\n{after.lstrip() and chr(10) + after.lstrip()}"
    with explained(directory, "the model card cannot be written"):
        write_atomic(path, whole)
