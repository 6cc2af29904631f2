"""A mergekit-moe YAML file, as its users already have it, in our words.

Only what has the same meaning here is taken; any other key is refused by name, so that nobody gets another
model than the file describes.
"""

from pathlib import Path
from typing import Any

from moesaic.config import read_text
from moesaic.errors import RecipeError

_MODES = {
    "hidden": "prompts",
    "hidden_avg": "prompts",
    "hidden_last": "prompts",
    "random": "random",
    "uniform_random": "random",
}
_KNOWN = {
    "base_model",
    "experts",
    "gate_mode",
    "dtype",
    "experts_per_token",
    "shared_experts",
}
_OF_EXPERTS = {"source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale"}
_DTYPES = {"float32", "bfloat16", "float16"}


def read_mergekit(path: Path) -> dict[str, Any]:
    """The table of MergeOptions that a mergekit-moe file describes. Raises RecipeError naming file and
    key."""
    table = _read(path)
    for key in table.keys() - _KNOWN:
        raise RecipeError(f"{path}: {key}: moesaic does not know this key of mergekit-moe; remove it")
    if not isinstance(table.get("base_model"), str):
        raise RecipeError(f"{path}: base_model: this key is required")
    mode = table.get("gate_mode", "hidden")
    if not isinstance(mode, str) or mode not in _MODES:
        raise RecipeError(f"{path}: gate_mode: {mode!r} is not supported; one of {', '.join(_MODES)} is")
    merged: dict[str, Any] = {"base": table["base_model"], "router": {"init": _MODES[mode]}, "experts": {}}
    if "experts_per_token" in table:
        merged["top_k"] = table["experts_per_token"]
    if (dtype := table.get("dtype")) is not None:
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise RecipeError(f"{path}: dtype: {dtype!r} is not supported; {', '.join(sorted(_DTYPES))} are")
        merged["dtype"] = dtype
    for number, expert in enumerate(_list(path, table, "experts")):
        name, source = _expert(path, f"experts[{number}]", expert)
        while name in merged["experts"]:
            name += "-2"
        merged["experts"][name] = source
    shared = _list(path, table, "shared_experts")
    if shared:
        _, source = _expert(path, "shared_experts[0]", shared[0])
        if len(shared) > 1 or source["model"] != table["base_model"]:
            raise RecipeError(f"{path}: shared_experts: only the base itself can be the one shared expert")
        merged["shared_expert"] = "base"
    return merged


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        table = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise RecipeError(f"{path}: is no mergekit-moe file; its top is a table of keys")
    return table


def _list(path: Path, table: dict[str, Any], key: str) -> list[Any]:
    value = table.get(key) or []
    if not isinstance(value, list):
        raise RecipeError(f"{path}: {key}: should be a list")
    return value


def _expert(path: Path, where: str, expert: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(expert, dict) or not isinstance(expert.get("source_model"), str):
        raise RecipeError(f"{path}: {where}: needs a source_model")
    for key in expert.keys() - _OF_EXPERTS:
        raise RecipeError(f"{path}: {where}.{key}: moesaic does not know this key of mergekit-moe; remove it")
    for key in ("noise_scale", "residual_scale"):
        if expert.get(key):
            raise RecipeError(f"{path}: {where}.{key}: is not supported; remove it")
    source = expert["source_model"]
    prompts = {new: expert.get(old) or [] for new, old in _PROMPTS.items()}
    return Path(source).name, {"model": source, **prompts}


_PROMPTS = {"positive": "positive_prompts", "negative": "negative_prompts"}
