"""The decoder: token ids in, hidden states or logits and one routing per sparse layer out.

Parameters carry Hugging Face names. No loss, optimizer, sampling or process group lives here.

Shape legend: B batch, T positions of this call, S positions with the cache, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.model.attention import Attention, KVCache, Rope, allowed_keys
from moesaic.model.config import ModelConfig
from moesaic.model.conv import ShortConv
from moesaic.model.dropout import dropout
from moesaic.model.experts import FeedForward
from moesaic.model.init import initialise
from moesaic.model.moe import MoE
from moesaic.model.norm import LayerNorm, RMSNorm
from moesaic.routing import Routing


@dataclass(frozen=True)
class Output:
    """What one call returns: final hidden states [B, T, D] after the last norm, logits [B, T, V]
    in the model's dtype unless they were not asked for, and one Routing per sparse layer, in order."""

    hidden_BTD: Tensor
    logits_BTV: Tensor | None
    routings: list[Routing]


class Block(nn.Module):
    """Attention, then a feed-forward network, each added to the residual stream. What goes into each is
    normalised, or what comes out (OLMo 2); before each, perhaps a short convolution."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        pre = config.norm_position == "pre"
        self.input_layernorm = _norm(config) if pre else None
        self.self_attn = Attention(config.attention, config.width, config.norm_eps, config.dropout)
        # By Hugging Face's names: after attention and before the feed-forward network, on the stream where
        # norms are "pre", on what attention gave where they are "post".
        self.post_attention_layernorm = _norm(config)
        self.post_feedforward_layernorm = None if pre else _norm(config)
        self.input_conv: ShortConv | None = None
        self.post_attention_conv: ShortConv | None = None
        if config.conv:
            self.input_conv = ShortConv(config.conv, config.width)
            self.post_attention_conv = ShortConv(config.conv, config.width)
        self.mlp: MoE | FeedForward
        if config.is_moe(layer):
            self.mlp = MoE(config.router, config.experts, config.width, config.dropout)
        else:
            self.mlp = FeedForward(config.ffn, config.width)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        allowed_BTS: Tensor | None,
        real_BT: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Routing | None]:
        return self.feed(*self.attend(x_BTD, rope, allowed_BTS, real_BT, cache), real_BT)

    def attend(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        allowed_BTS: Tensor | None,
        real_BT: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """The stream after attention, and what the feed-forward network (a router too) gets of it."""
        before = None if cache is None or cache.before_LPBJD is None else cache.before_LPBJD[self.layer]
        h_BTD = x_BTD if self.input_layernorm is None else self.input_layernorm(x_BTD)
        if self.input_conv is not None:
            h_BTD = self.input_conv(h_BTD, real_BT, None if before is None else before[0])
        h_BTD = self.self_attn(h_BTD, rope, allowed_BTS, cache, self.layer)
        if self.post_feedforward_layernorm is None:
            x_BTD = x_BTD + h_BTD
            h_BTD = self.post_attention_layernorm(x_BTD)
        else:
            x_BTD = h_BTD = x_BTD + self.post_attention_layernorm(h_BTD).to(x_BTD.dtype)
        if self.post_attention_conv is not None:
            h_BTD = self.post_attention_conv(h_BTD, real_BT, None if before is None else before[1])
        return x_BTD, h_BTD

    def feed(self, x_BTD: Tensor, h_BTD: Tensor, real_BT: Tensor | None) -> tuple[Tensor, Routing | None]:
        """The stream after the feed-forward network, and the routing of a sparse one."""
        routing = None
        if isinstance(self.mlp, MoE):
            y_TD, routing = self.mlp(h_BTD.flatten(0, 1), None if real_BT is None else real_BT.flatten())
            h_BTD = y_TD.view_as(x_BTD)
        else:
            h_BTD = dropout(self.mlp(h_BTD), self.dropout, self.training)
        if self.post_feedforward_layernorm is not None:
            h_BTD = self.post_feedforward_layernorm(h_BTD)
        return x_BTD + h_BTD.to(x_BTD.dtype), routing


class Decoder(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tied = config.tied
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.embed_positions: nn.Embedding | None = None
        if config.position == "learned":
            self.embed_positions = nn.Embedding(config.context, config.width)
        self.rope = (
            Rope(config.attention, config.attention.head_size(config.width))
            if config.position == "rope"
            else None
        )
        self.layers = nn.ModuleList([Block(config, layer) for layer in range(config.layers)])
        self.norm = _norm(config)

    def forward(
        self,
        ids_BT: Tensor,
        real_BT: Tensor | None,
        cache: KVCache | None,
        document_BT: Tensor | None = None,
    ) -> tuple[Tensor, list[Routing]]:
        T = ids_BT.shape[1]
        start = 0 if cache is None else cache.length
        real_BS = _real_with_cache(real_BT, cache, start, T)
        if document_BT is not None:
            position_BT = _within_documents(document_BT)
        elif real_BS is None:
            position_BT = torch.arange(start, start + T, device=ids_BT.device)[None]
        else:  # a padded row's first real token is its position 0
            position_BT = (real_BS.cumsum(1) - 1).clamp(min=0)[:, start:]
        # Beside a head's gradient, to which it is added, a sparse one saves two tensors of the vocabulary's
        # size; on CUDA it would be added up in any order.
        self.embed_tokens.sparse = self.tied and self.training and ids_BT.device.type == "cpu"
        x_BTD = self.embed_tokens(ids_BT)
        if torch.is_autocast_enabled(x_BTD.device.type):  # products are rounded then, their sum is not
            x_BTD = x_BTD.float()
        if self.embed_positions is not None:
            x_BTD = x_BTD + self.embed_positions(position_BT)
        rope = None if self.rope is None else self.rope(position_BT)
        allowed_BTS = allowed_keys(T, cache, real_BS, ids_BT.device, document_BT)
        routings = []
        for block in self.layers:
            x_BTD, routing = block(x_BTD, rope, allowed_BTS, real_BT, cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += T
        return self.norm(x_BTD), routings


class LanguageModel(nn.Module):
    """A decoder with its output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.width, config.vocabulary, config.head_bias)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            initialise(self, config.init)

    def forward(
        self,
        ids_BT: Tensor,
        real_BT: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        document_BT: Tensor | None = None,
        logits: bool = True,
    ) -> Output:
        """Run the model on token ids, int64 [B, T].

        ``real_BT`` is False at padding, on either side; None means no padding. With a cache the ids
        continue what it holds. ``document_BT``, int64, numbers the documents that are packed into a row:
        none sees another, and each begins at position 0. ``logits=False`` leaves the head to the caller (a
        chunked loss). Raises ValueError for more positions than ``config.context`` with learned positions,
        and for packed documents with a cache or with short convolutions, which look across borders.
        """
        if document_BT is not None and (cache is not None or self.config.conv):
            raise ValueError("packed documents go with neither a cache nor short convolutions")
        if self.config.position == "learned":
            end = ids_BT.shape[1] + (0 if cache is None else cache.length)
            if end > self.config.context:
                raise ValueError(f"{end} positions, but the model has learned {self.config.context}")
        hidden_BTD, routings = self.model(ids_BT, real_BT, cache, document_BT)
        return Output(hidden_BTD, self.lm_head(hidden_BTD) if logits else None, routings)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty key-value cache for ``batch`` sequences of up to ``capacity`` positions."""
        config, weight = self.config, self.model.embed_tokens.weight
        heads, head_dim = config.attention.num_kv_heads, config.attention.head_size(config.width)
        before = None
        if config.conv:
            before = weight.new_zeros(config.layers, 2, batch, config.conv - 1, config.width)
        return KVCache(config.layers, batch, capacity, heads, head_dim, weight.device, weight.dtype, before)

    def moe_modules(self) -> list[MoE]:
        """The sparse layers in the order of ``Output.routings``."""
        return [m for m in self.modules() if isinstance(m, MoE)]


def _norm(config: ModelConfig) -> nn.Module:
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    return kind(config.width, eps=config.norm_eps)


def _within_documents(document_BT: Tensor) -> Tensor:
    """The position of each token in its own document, int64 [B, T]."""
    place_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return place_BT - (place_BT * begins_BT).cummax(dim=1).values


def _real_with_cache(real_BT: Tensor | None, cache: KVCache | None, start: int, T: int) -> Tensor | None:
    """The padding mask over cached and new positions, bool [B, S]; None where nothing is padding."""
    if cache is None:
        return real_BT
    if real_BT is not None:
        cache.real_BS[:, start : start + T] = real_BT
        cache.padded = cache.padded or not bool(real_BT.all())
    return cache.real_BS[:, : start + T] if cache.padded else None
