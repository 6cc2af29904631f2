"""What a model is: the one description from which it is built, counted and costed."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from moesaic.config import Options
from moesaic.model.attention import AttentionOptions
from moesaic.model.experts import ExpertOptions, FFNOptions
from moesaic.model.routers import RouterOptions, SmartOptions, TopKOptions, product_keys


class InitOptions(Options):
    """Initial weights: He or Glorot by fan-in and fan-out, or (truncated) normal of one deviation.

    ``kaiming`` and ``xavier`` leave embeddings at N(0, 1) and biases uniform in ±1/√fan_in, as
    PyTorch and makeMoE do; ``normal`` and ``trunc_normal`` (cut at 3σ, as OLMoE) use ``std`` for
    embeddings too and zero biases. ``zero_output`` starts every block as the identity by zeroing
    the matrices that write to the residual stream.
    """

    kind: Literal["kaiming", "xavier", "normal", "trunc_normal"] = "trunc_normal"
    std: float = Field(0.02, gt=0)
    zero_output: bool = False


class ModelConfig(Options):
    """A decoder: ``layers`` blocks of attention and a feed-forward network, dense or sparse.

    ``pattern`` says which, repeated over the layers: ``M`` a mixture of experts, ``D`` dense.
    ``context`` is the longest sequence: the length of the table of learned positions, and the
    window that generation slides. ``norm_position``: norms stand before attention and feed-forward network,
    or after them (OLMo 2, arXiv 2501.00656, section 3.2). ``conv`` is the kernel size of the short causal
    convolutions before attention and feed-forward network (conv.py); 0 leaves them out.
    """

    layers: int = Field(4, ge=1, le=1024)
    width: int = Field(128, ge=1, le=65_536)
    vocab_size: int | None = Field(None, ge=1, le=2**24)
    context: int = Field(256, ge=1, le=2**24)
    pattern: str = Field("M", pattern="^[MD]+$")
    position: Literal["rope", "learned"] = "rope"
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: float = Field(1e-5, gt=0)
    tied: bool = False
    head_bias: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    conv: int = Field(0, ge=0, le=64)
    attention: AttentionOptions = AttentionOptions()
    ffn: FFNOptions = FFNOptions()
    experts: ExpertOptions = ExpertOptions()
    router: RouterOptions = TopKOptions()
    init: InitOptions = InitOptions()

    @field_validator("router", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        return {"kind": "top_k", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        attention = self.attention
        if attention.head_dim is None and self.width % attention.heads:
            raise ValueError(
                f"width = {self.width} does not divide into attention.heads = {attention.heads}; "
                "change one of them or set attention.head_dim"
            )
        if isinstance(self.router, SmartOptions) and self.router.keys == "product":
            count = self.experts.count
            if count > 3 and product_keys(count)[0] == 1 and self.moe_layers:
                raise ValueError(
                    f"experts.count = {count} is prime, so product keys would be as many as the experts; "
                    "choose a product of two numbers near each other (4096 is 64 · 64)"
                )
        if attention.heads % attention.num_kv_heads:
            raise ValueError(
                f"attention.heads = {attention.heads} is not a multiple of "
                f"attention.kv_heads = {attention.num_kv_heads}"
            )
        if self.position == "learned" and attention.rope_scaling is not None:
            raise ValueError("attention.rope_scaling needs position = 'rope'; learned positions have none")
        if self.position == "rope" and attention.head_size(self.width) % 2:
            raise ValueError(f"RoPE needs an even head size, not {attention.head_size(self.width)}")
        if self.moe_layers and self.router.top_k > self.experts.count:
            raise ValueError(
                f"router.top_k = {self.router.top_k} is above experts.count = {self.experts.count}"
            )
        if len(self.pattern) > self.layers:
            raise ValueError(f"pattern = {self.pattern!r} is longer than layers = {self.layers}")
        return self

    def is_moe(self, layer: int) -> bool:
        return self.pattern[layer % len(self.pattern)] == "M"

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.layers) if self.is_moe(layer)]

    @property
    def vocabulary(self) -> int:
        """The vocabulary size, which a recipe leaves to the tokenizer and a built model must know."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not set; it comes from the tokenizer")
        return self.vocab_size

    def parts(self) -> dict[str, int]:
        """Trainable parameters by what they are part of, without building anything."""
        norm = self.width * (2 if self.norm == "layer" else 1)
        embeddings = self.vocabulary * self.width * (1 if self.tied else 2)
        embeddings += self.vocabulary if self.head_bias else 0
        embeddings += self.context * self.width if self.position == "learned" else 0
        sparse = len(self.moe_layers)
        found = {
            "embeddings": embeddings,
            "attention": self.layers * self.attention.parameters(self.width),
            "norms": norm + self.layers * 2 * norm,
            "convolutions": self.layers * 2 * self.conv * self.width,
            "dense networks": (self.layers - sparse) * self.ffn.parameters(self.width),
            "experts": sparse * self.experts.count * self.experts.parameters(self.width),
            "routers": sparse * self.router.parameters(self.width, self.experts.count),
            "shared experts": sparse * self._shared_expert_parameters(),
        }
        return {name: count for name, count in found.items() if count}

    def parameters(self) -> "Parameters":
        """Trainable parameters, total and active per token, without building anything."""
        total = sum(self.parts().values())
        idle = self.experts.count - self.router.top_k
        unused = len(self.moe_layers) * idle * self.experts.parameters(self.width)
        return Parameters(total=total, active=total - unused)

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one token's forward pass in a full window of ``seq_len``.

        Two per multiply-add of every matrix product, attention scores over the whole window (as
        counted by PaLM, arXiv 2204.02311, appendix B) and the output head included; element-wise
        work is not. A training step costs three times this.
        """
        attention = self.attention
        size = attention.head_size(self.width)
        q, kv = attention.heads * size, attention.num_kv_heads * size
        block = self.width * (2 * q + 2 * kv) + 2 * seq_len * q
        total = self.layers * block + self.width * self.vocabulary
        total += (self.layers - len(self.moe_layers)) * self.ffn.multiply_adds(self.width)
        routed = self.router.top_k * self.experts.multiply_adds(self.width)
        router = self.router.multiply_adds(self.width, self.experts.count)
        shared = 0
        if self.experts.shared is not None:
            shared = self.experts.shared.multiply_adds(self.width)
            shared += self.width if self.experts.shared_gate else 0
        total += len(self.moe_layers) * (routed + router + shared)
        return 2 * total

    def dense_twin(self) -> "ModelConfig":
        """A dense model of equal active size: its FFNs are as wide as the experts a token uses.

        Raises ValueError for a pattern that has dense layers already, which have a width of their own.
        """
        if "D" in self.pattern:
            raise ValueError(
                f"pattern = {self.pattern!r} has dense layers; only an all-sparse model has a twin"
            )
        experts = self.experts
        hidden = self.router.top_k * experts.hidden + experts.shared_hidden
        ffn = FFNOptions(kind=experts.kind, hidden=hidden, bias=experts.bias)
        return self.model_copy(update={"pattern": "D", "ffn": ffn})

    def _shared_expert_parameters(self) -> int:
        shared = self.experts.shared
        if shared is None:
            return 0
        return shared.parameters(self.width) + (self.width if self.experts.shared_gate else 0)


class Parameters(Options):
    """Counts of trainable parameters. ``active`` leaves out the experts a token does not use."""

    total: int
    active: int
