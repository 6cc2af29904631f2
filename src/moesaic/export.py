"""Hand a model over: from anything that ``moesaic.load`` opens to what other tools open."""

import json
import os
import tomllib
from pathlib import Path
from typing import Literal

import torch

from moesaic.errors import RecipeError
from moesaic.lm import LM, load
from moesaic.offload.model import into_memory
from moesaic.weights.carried import carried_files
from moesaic.weights.gguf import KINDS, write_gguf
from moesaic.weights.hf import model_type, tokenizer_files, write_hf
from moesaic.weights.manifest import CARD

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    source: str | Path, out: str | Path, to: Literal["hf", "gguf"] = "hf", dtype: str | None = None
) -> str:
    """Write the model at ``source`` to ``out`` and return the architecture it became.

    ``hf``: a directory for ``AutoModelForCausalLM``, with tokenizer, generation config and a model card;
    ``dtype`` float32, bfloat16 or float16, else as it is stored. ``gguf``: one file for llama.cpp; ``dtype``
    f32, f16 (the default), bf16 or q8_0. Raises RecipeError where a stock architecture cannot express the
    model (naming the settings in the way), or ``out`` is not new.
    """
    out = Path(out).expanduser()
    known = [*DTYPES] if to == "hf" else [*KINDS] if to == "gguf" else []
    if not known:
        raise RecipeError(f"--to {to}: hf and gguf are the formats")
    if dtype is not None and dtype not in known:
        raise RecipeError(f"--dtype {dtype}: {to} takes {', '.join(known)}")
    if (to == "gguf") != (out.suffix == ".gguf"):
        raise RecipeError(f"{out}: a GGUF is a file that ends in .gguf, and nothing else does")
    empty = to == "hf" and out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and not empty:
        raise RecipeError(f"{out}: exists; choose another name")
    lm = load(source)
    into_memory(lm.model)
    tokenizer, config = lm.known_tokenizer, lm.config
    eos = sorted(lm.stop_ids)
    if not eos and tokenizer is not None and tokenizer.eos_id is not None:
        eos = [tokenizer.eos_id]
    if to == "gguf":
        return write_gguf(out, config, lm.model, tokenizer, name=out.stem, kind=dtype or "f16", eos=eos)
    if dtype is not None:
        for parameter in lm.model.parameters():  # one at a time, so that no second copy of the model exists
            parameter.data = parameter.data.to(DTYPES[dtype])
            if not parameter.isfinite().all():
                raise RecipeError(f"--dtype {dtype} cannot hold all of the weights; use bfloat16")
    files = {} if tokenizer is None else tokenizer_files(tokenizer)
    files |= carried_files(lm.path)
    files[CARD] = model_card(lm, out.name).encode()
    return write_hf(out, config, lm.model, files, eos, model_type(lm.path)).architecture


def model_card(lm: LM, title: str) -> str:
    """A README.md for the model: what it is, how it was trained, how to open it. Facts only."""
    counts, config = lm.config.parameters(), lm.config
    rows = [
        ("parameters", f"{counts.total:,} in all, {counts.active:,} active per token"),
        ("layers × width", f"{config.layers} × {config.width}"),
        ("context", f"{config.context:,} tokens"),
        ("vocabulary", f"{config.vocabulary:,}"),
    ]
    if config.moe_layers:
        sparse = (
            f"{config.experts.count} of hidden size {config.experts.hidden}, {config.router.top_k} per token"
        )
        rows.append(("experts", f"{sparse}, in {len(config.moe_layers)} of {config.layers} layers"))
    rows += _training(lm.path)
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [{"mixture-of-experts, " if config.moe_layers else ""}moesaic]
---

# {title}

{"A sparse mixture-of-experts" if config.moe_layers else "A dense"} language model, exported by moesaic.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

It has no licence of its own: that of its training data and of the models it was made from applies.
"""


def _training(path: Path) -> list[tuple[str, str]]:
    """Rows on the run that made the model at ``path``, where one of ours lies in one."""
    run = next((p for p in path.resolve().parents[:2] if (p / "recipe.toml").is_file()), None)
    if run is None or not (path / "moesaic.json").is_file():
        return []
    try:
        step = json.loads((path / "moesaic.json").read_text(encoding="utf-8"))["step"]
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
        rows = [("trained on", f"{recipe['data']['source']}, {step:,} steps ({recipe['name']})")]
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # the last may be torn
        held_out = [row for row in map(json.loads, lines) if row["split"] == "val" and row["step"] <= step]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # a card without these rows is better than none
    if held_out:
        last = held_out[-1]
        rows.append(("held-out loss", f"{last['loss']:.4f} nats per token at step {last['step']:,}"))
    return rows
