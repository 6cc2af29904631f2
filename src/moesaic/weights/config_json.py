"""A config.json of others in our words, and back, by the rows of families.py.

Reading follows the family's row; writing refuses a model that differs from it and names every setting that
stands in the way.
"""

from typing import Any

from moesaic.config import flatten, validate
from moesaic.errors import CheckpointError, RecipeError
from moesaic.model.config import ModelConfig
from moesaic.weights.families import FAMILIES, Family
from moesaic.weights.rope import read_rope, write_rope

# Without these a file describes no model, whatever transformers would assume.
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}


def read_config(table: dict[str, Any], where: str) -> tuple[Family, ModelConfig, list[str]]:
    """The family and our settings of a config.json, and sentences on what the reader should know.

    Keys that no row names are not read: ``auto_map`` and underscore keys do nothing. Raises CheckpointError
    naming the file, the key and what is wrong with it.
    """
    kind = table.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise CheckpointError(f"{where}: model_type = {kind!r} is none of {', '.join(FAMILIES)}")
    if table.get("quantization_config") is not None:
        raise CheckpointError(
            f"{where}: quantization_config: quantised weights are not read; use the full-precision model"
        )
    missing = [key for key in _REQUIRED if table.get(key) is None]
    if missing:
        raise CheckpointError(f"{where}: {', '.join(missing)}: missing")
    settings = dict(family.fixed)
    for key, paths in family.keys.items():
        for path in paths:
            value = _value(table, key, family, where)
            if value is not None:
                settings[path] = value
    if settings.get("attention.kv_heads") is None:
        settings["attention.kv_heads"] = settings["attention.heads"]
    for key, known in (("hidden_act", "silu"), ("clip_qkv", None)):
        if table.get(key, known) != known:
            raise CheckpointError(f"{where}: {key} = {table[key]!r} is not supported, only {known!r} is")
    settings.update(read_rope(table, family.defaults["rope_theta"], where))
    settings["pattern"] = _read_pattern(table, family, where)
    names = table.get("expert_names")  # moesaic's own
    if isinstance(names, list) and len(names) == settings.get("experts.count"):
        settings["experts.names"] = [str(name)[:64] for name in names if str(name).isprintable()]
    notes = _limit_window(table, family, settings)
    if "auto_map" in table:
        notes.append(f"{where}: auto_map asks for code of its author, which moesaic never runs")
    try:
        return family, validate(ModelConfig, _nested(settings), where), notes
    except RecipeError as error:
        raise CheckpointError(_in_their_words(str(error), family)) from None


def write_config(config: ModelConfig, prefer: str | None = None) -> tuple[Family, dict[str, Any]]:
    """The family that can express ``config``, and its config.json; loads in transformers 4 and 5. Where
    several can, ``prefer`` names the one to take.

    Raises RecipeError naming the settings that stand in the way of the family that comes nearest.
    """
    tried = [(obstacles(config, family), family) for family in FAMILIES.values()]
    found = [family for problems, family in tried if not problems]
    if not found:
        problems, nearest = min(tried, key=lambda pair: len(pair[0]))
        raise RecipeError(
            "no stock architecture of transformers can express this model; nearest is "
            f"{nearest.architecture}, but {'; '.join(problems)}"
        )
    family, flat = next((f for f in found if f.model_type == prefer), found[0]), _flat(config)
    table: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    table.update({key: flat[paths[0]] for key, paths in family.keys.items()})
    table["num_key_value_heads"] = config.attention.num_kv_heads
    table["head_dim"] = config.attention.head_size(config.width)
    table.update(hidden_act="silu", attention_dropout=0.0, initializer_range=config.init.std, use_cache=True)
    table.update(write_rope(config.attention))
    if config.moe_layers and config.experts.names:
        table["expert_names"] = config.experts.names
    if family.sparse:
        table.update(output_router_logits=False, router_aux_loss_coef=0.01)
    if family.by_pattern:
        dense = [layer for layer in range(config.layers) if not config.is_moe(layer)]
        table.update(decoder_sparse_step=1, mlp_only_layers=dense)
        # transformers 5 writes and prefers num_local_experts, transformers 4 and others read num_experts.
        table["num_local_experts"] = table["num_experts"]
    if "sliding_window" in family.defaults or family.by_pattern or family.model_type in ("qwen2", "qwen3"):
        table.update(sliding_window=None, use_sliding_window=False)
    return family, table


def obstacles(config: ModelConfig, family: Family) -> list[str]:
    """What of ``config`` the family's architecture has no way to say, a phrase each."""
    flat, problems = _flat(config), []
    sparse, dense = bool(config.moe_layers), len(config.moe_layers) < config.layers
    if sparse and not family.sparse:
        problems.append("it is dense")
    elif dense and (not sparse if family.by_pattern else family.sparse):
        problems.append(
            f"model.pattern = {config.pattern!r} has {'no sparse' if not sparse else 'dense'} layers"
        )
    if "experts.shared_hidden" not in family.fixed and not config.experts.shared_hidden:
        problems.append("model.experts.shared_hidden = 0 where it has a shared expert")
    for path, value in family.fixed.items():
        part = path.partition(".")[0]
        unused = (part in ("experts", "router") and not sparse) or (part == "ffn" and not dense)
        if not unused and flat.get(path, value) != value:
            problems.append(f"model.{path} = {_said(flat[path])} (it has {_said(value)})")
    for paths in family.keys.values():
        if len({flat.get(path) for path in paths}) > 1:
            problems.append(" and ".join(f"model.{path} = {_said(flat[path])}" for path in paths) + " differ")
    return problems


def _value(table: dict[str, Any], key: str, family: Family, where: str) -> Any:
    alias = _ALIASES.get(key)
    if alias in table and key in table and table[key] != table[alias]:
        raise CheckpointError(f"{where}: {key} = {table[key]!r} contradicts {alias} = {table[alias]!r}")
    if key == "num_key_value_heads" and key in table:
        return table[key]  # where it is null, as many as there are heads
    given = table.get(key)
    given = table.get(alias) if given is None and alias is not None else given
    return family.defaults.get(key) if given is None else given


def _read_pattern(table: dict[str, Any], family: Family, where: str) -> str:
    if not family.sparse:
        return "D"
    if not family.by_pattern:
        return "M"
    layers, step = table["num_hidden_layers"], table.get("decoder_sparse_step", 1)
    dense = table.get("mlp_only_layers") or []
    sound = isinstance(step, int) and step >= 1 and isinstance(dense, list)
    sound = sound and len(dense) <= 1024 and all(isinstance(layer, int) for layer in dense)
    if not sound or not isinstance(layers, int) or not 1 <= layers <= 1024:
        raise CheckpointError(
            f"{where}: decoder_sparse_step, mlp_only_layers or num_hidden_layers is not sound"
        )
    pattern = "".join("D" if i in dense or (i + 1) % step else "M" for i in range(layers))
    return pattern[0] if len(set(pattern)) == 1 else pattern


def _limit_window(table: dict[str, Any], family: Family, settings: dict[str, Any]) -> list[str]:
    """Within a sliding window attention is plain; so the context ends where the window does."""
    window = table.get("sliding_window", family.defaults.get("sliding_window"))
    used = table.get(
        "use_sliding_window", "sliding_window" in family.defaults or family.model_type == "mixtral"
    )
    context = settings["context"]
    if not used or not isinstance(window, int) or not isinstance(context, int) or not 0 < window < context:
        return []
    settings["context"] = window
    return [f"sliding_window = {window}: the context ends there, up to where attention is exact"]


def _flat(config: ModelConfig) -> dict[str, Any]:
    flat = {key: value for key, value in flatten(config).items() if key != "attention.rope_scaling"}
    if flat.get("router.softmax_after"):  # the renormalised softmax written another way
        flat["router.renormalize"] = True
    return flat


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for path, value in settings.items():
        part, _, name = path.rpartition(".")
        (table.setdefault(part, {}) if part else table)[name] = value
    return table


def _in_their_words(message: str, family: Family) -> str:
    """A sentence on one of our settings, with the key of config.json that it came from."""
    for key, paths in family.keys.items():
        for path in paths:
            message = message.replace(f": {path} ", f": {key} ").replace(f": {path}:", f": {key}:")
    return message


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
