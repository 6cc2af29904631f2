"""What a model directory carries besides weights: special tokens, chat template, what it was merged of; JSON
and text alone."""

import json
import os
from pathlib import Path

from moesaic.weights.shards import read_json_file, real_file

TEMPLATE = "chat_template.jinja"
MERGE = "merge.toml"  # the recipe of a merge, as mergekit leaves its own
_CARRIED = ("special_tokens_map.json", "tokenizer_config.json", TEMPLATE, MERGE)
_MOST_BYTES = 64 * 2**20


def carried_files(directory: Path) -> dict[str, bytes]:
    """What a foreign directory has besides weights and tokenizer.json, without what names code to run."""
    found = {}
    for name in _CARRIED:
        if not os.path.lexists(directory / name):
            continue
        if name.endswith(".json"):
            table = read_json_file(directory / name)
            if isinstance(table, dict):
                table.pop("auto_map", None)
            found[name] = (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode()
        else:
            file = real_file(directory / name)  # no link brings a file from elsewhere into an export
            if file.stat().st_size < _MOST_BYTES:
                found[name] = file.read_bytes()
    return found
