"""The model families of others, a row each; config_json.py reads and writes by it.

A row says which keys of a config.json are which of our settings (``keys``), what the architecture takes for
granted (``fixed``), and what transformers 5.23 assumes for a key that a file leaves out (``defaults``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """``experts`` names an expert's gate, up and down matrices on disk, ``mlp`` the module they are in."""

    model_type: str
    architecture: str
    keys: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]
    defaults: Mapping[str, Any]
    sparse: bool = True
    mlp: str = "mlp"
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    @property
    def by_pattern(self) -> bool:
        """Whether single layers may be dense (Qwen's ``decoder_sparse_step`` and ``mlp_only_layers``)."""
        return "decoder_sparse_step" in self.defaults


_KEYS: dict[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "hidden_size": ("width",),
    "num_hidden_layers": ("layers",),
    "max_position_embeddings": ("context",),
    "rms_norm_eps": ("norm_eps",),
    "tie_word_embeddings": ("tied",),
    "num_attention_heads": ("attention.heads",),
    "num_key_value_heads": ("attention.kv_heads",),
    "head_dim": ("attention.head_dim",),
}
_BIAS = {"attention_bias": ("attention.qkv_bias", "attention.out_bias")}
_DENSE = {"intermediate_size": ("ffn.hidden",)}
_ROUTED = {"num_experts": ("experts.count",), "num_experts_per_tok": ("router.top_k",)}
_NORMED = {"norm_topk_prob": ("router.renormalize",)}
_SMALL = {"moe_intermediate_size": ("experts.hidden",)}

_FIXED: dict[str, Any] = {
    "position": "rope",
    "norm": "rms",
    "norm_position": "pre",
    "head_bias": False,
    "conv": 0,
    "attention.scale": "head",
    "attention.qk_norm": "none",
    "ffn.kind": "swiglu",
    "ffn.bias": False,
    "experts.kind": "swiglu",
    "experts.bias": False,
    "experts.shared_hidden": 0,
    "experts.shared_gate": False,
    "router.kind": "top_k",
    "router.score": "softmax",
    "router.bias": False,
    "router.eval_capacity_factor": None,
}
_NO_BIAS = {"attention.qkv_bias": False, "attention.out_bias": False}
_ASSUMED: dict[str, Any] = {"tie_word_embeddings": False, "rope_theta": 10_000.0, "hidden_act": "silu"}
_PATTERN = {"decoder_sparse_step": 1, "mlp_only_layers": []}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "olmoe",
            "OlmoeForCausalLM",
            {**_KEYS, **_BIAS, **_ROUTED, **_NORMED, "intermediate_size": ("experts.hidden",)},
            {**_FIXED, "attention.qk_norm": "full"},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "attention_bias": False,
                "norm_topk_prob": False,
                "num_experts": 64,
                "num_experts_per_tok": 8,
            },
        ),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {**_KEYS, **_BIAS, **_DENSE, **_ROUTED, **_NORMED, **_SMALL},
            {**_FIXED, "attention.qk_norm": "head"},
            {
                **_ASSUMED,
                **_PATTERN,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 4,
                "attention_bias": False,
                "norm_topk_prob": False,
                "num_experts": 128,
                "num_experts_per_tok": 8,
            },
        ),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            {
                **_KEYS,
                "num_local_experts": ("experts.count",),
                "num_experts_per_tok": ("router.top_k",),
                "intermediate_size": ("experts.hidden",),
            },
            {**_FIXED, **_NO_BIAS, "router.renormalize": True},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            mlp="block_sparse_moe",
            experts=("w1", "w3", "w2"),
        ),
        Family(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            {
                **_KEYS,
                **_DENSE,
                **_ROUTED,
                **_NORMED,
                **_SMALL,
                "qkv_bias": ("attention.qkv_bias",),
                "shared_expert_intermediate_size": ("experts.shared_hidden",),
            },
            {
                **{key: value for key, value in _FIXED.items() if key != "experts.shared_hidden"},
                "attention.out_bias": False,
                "experts.shared_gate": True,
            },
            {
                **_ASSUMED,
                **_PATTERN,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 16,
                "qkv_bias": True,
                "norm_topk_prob": False,
                "num_experts": 60,
                "num_experts_per_tok": 4,
            },
        ),
        Family(
            "flex_olmo",
            "FlexOlmoForCausalLM",
            {**_KEYS, **_BIAS, **_ROUTED, **_NORMED, "intermediate_size": ("experts.hidden",)},
            {**_FIXED, "attention.qk_norm": "full", "norm_position": "post"},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-6,
                "rope_theta": 500_000.0,
                "max_position_embeddings": 4096,
                "attention_bias": False,
                "norm_topk_prob": False,
                "num_experts": 7,
                "num_experts_per_tok": 5,
            },
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            {**_KEYS, **_BIAS, **_DENSE},
            {**_FIXED, "attention.qk_norm": "full", "norm_position": "post"},
            {**_ASSUMED, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
            sparse=False,
        ),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_KEYS, **_BIAS, **_DENSE},
            {**_FIXED, "attention.qk_norm": "head"},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 32,
                "head_dim": 128,
                "attention_bias": False,
            },
            sparse=False,
        ),
        Family(
            "llama",
            "LlamaForCausalLM",
            {**_KEYS, **_BIAS, **_DENSE, "mlp_bias": ("ffn.bias",)},
            {key: value for key, value in _FIXED.items() if key != "ffn.bias"},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "attention_bias": False,
                "mlp_bias": False,
            },
            sparse=False,
        ),
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            {**_KEYS, **_DENSE},
            {**_FIXED, "attention.qkv_bias": True, "attention.out_bias": False},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32_768,
                "num_key_value_heads": 32,
            },
            sparse=False,
        ),
        Family(
            "mistral",
            "MistralForCausalLM",
            {**_KEYS, **_DENSE},
            {**_FIXED, **_NO_BIAS},
            {
                **_ASSUMED,
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 131_072,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
            sparse=False,
        ),
    )
}
