"""Rotary positions in a config.json: transformers 5's ``rope_parameters``, and what came before it."""

from typing import Any

from moesaic.errors import CheckpointError
from moesaic.model.attention import AttentionOptions, RopeScaling


def read_rope(table: dict[str, Any], theta: float, where: str) -> dict[str, Any]:
    """Our ``attention.rope_theta`` and ``attention.rope_scaling``; ``theta`` is the family's default.

    ``rope_parameters`` (transformers 5) goes before ``rope_theta`` and ``rope_scaling``. Raises
    CheckpointError for a kind of scaling that is not ours, and for rotating a part of the head only.
    """
    given = table.get("rope_parameters") or table.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{where}: rope_parameters = {given!r} is not a table")
    if any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{where}: rope_parameters differ by kind of layer, which is not supported")
    kind = given.get("rope_type", given.get("type", "default"))
    partial = given.get("partial_rotary_factor", table.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1):
        raise CheckpointError(f"{where}: partial_rotary_factor = {partial!r}: only whole heads are rotated")
    settings: dict[str, Any] = {
        "attention.rope_theta": given.get("rope_theta", table.get("rope_theta") or theta)
    }
    if kind == "llama3":
        known = RopeScaling.model_fields
        settings["attention.rope_scaling"] = {
            **{name: value for name, value in given.items() if name in known},
            "rope_type": "llama3",
        }
    elif kind != "default":
        raise CheckpointError(f"{where}: rope_type = {kind!r}: only 'default' and 'llama3' are known")
    return settings


def write_rope(options: AttentionOptions) -> dict[str, Any]:
    """The keys of transformers 5 and of 4 side by side, saying the same."""
    scaling = None if options.rope_scaling is None else options.rope_scaling.model_dump()
    return {
        "rope_theta": options.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": options.rope_theta},
    }
