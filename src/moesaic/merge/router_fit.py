"""The first router of a merge, found in closed form from text, before any training.

The model is walked through once, a layer at a time: attention, then the router is fitted to what it will
really see (what the norm gives after the layers below, their routers fitted already), then the experts. One
layer is in memory, and the hidden states of the text.

``ridge``: W = argmin Σ ‖W x − (y − 1/E)‖² + λ ‖W‖², y telling whose text a token is (DUME, arXiv 2603.29765),
every expert's text counting as much. ``ridge-unlabelled``: y is a softmax over the experts of minus the loss
of each dense expert around the token. ``prompts``: the mean input over an expert's positive prompts, less
that of its negative ones, centred over the experts (mergekit's ``hidden``, at the gate's own input).

Shape legend: N windows, B windows of a batch, T positions, D width, E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import DataError
from moesaic.losses import token_losses
from moesaic.machine import multiplies_bf16
from moesaic.merge.donors import Donor
from moesaic.merge.options import RouterInit, RouterMode
from moesaic.merge.tensors import Merged
from moesaic.model.attention import Rope, allowed_keys
from moesaic.model.moe import MoE
from moesaic.model.transformer import Block, LanguageModel

Say = Callable[[str], None]

_BATCH_TOKENS = 2048
_MOST_LOGITS = 2**24  # numbers at once: 64 MB, thrice
_WINDOW = 32  # tokens over which a dense expert's loss is averaged: one token says too little


@dataclass(frozen=True)
class Calibration:
    """Text to fit a router to: ids int64 [N, T], where they are real, and whose they are by expert, [N, E] or
    for every token [N, T, E]. Rows of ``whose`` may be negative (a negative prompt)."""

    ids_NT: Tensor
    real_NT: Tensor
    whose: Tensor

    def batches(self) -> Iterator[slice]:
        size = max(1, _BATCH_TOKENS // self.ids_NT.shape[1])
        for start in range(0, len(self.ids_NT), size):
            yield slice(start, start + size)


def labelled(windows: list[Tensor]) -> Calibration:
    """Calibration from the windows [n, T] of each expert's own text."""
    whose = torch.eye(len(windows)).repeat_interleave(torch.tensor([len(w) for w in windows]), dim=0)
    ids_NT = torch.cat(windows)
    return Calibration(ids_NT, torch.ones_like(ids_NT, dtype=torch.bool), whose)


def prompted(prompts: list[tuple[list[Tensor], list[Tensor]]]) -> Calibration:
    """Calibration from the ids of each expert's positive and negative prompts, padded to one length."""
    rows: list[tuple[Tensor, int, float]] = []
    for e, (positive, negative) in enumerate(prompts):
        rows += [(ids, e, 1.0) for ids in positive] + [(ids, e, -1.0) for ids in negative]
    longest = max(len(ids) for ids, _, _ in rows)
    ids_NT = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids, _, _ in rows])
    length_N1 = torch.tensor([[len(ids)] for ids, _, _ in rows])
    whose_NE = torch.zeros(len(rows), len(prompts))
    for n, (_, e, sign) in enumerate(rows):
        whose_NE[n, e] = sign
    return Calibration(ids_NT, torch.arange(longest) < length_N1, whose_NE)


@torch.no_grad()
def unlabelled(experts: list[Donor], ids_NT: Tensor, say: Say) -> Calibration:
    """Calibration from mixed text, each token belonging to the dense experts that predict it best."""
    losses = []
    for donor in experts:
        say(f"reading the calibration text as {donor.name} does")
        with torch.device("meta"):
            model = LanguageModel(donor.found.config)
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            filled = torch.nn.Parameter(donor.read(name).reshape(parameter.shape), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, filled)
        if donor.found.config.tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        losses.append(_losses(model, ids_NT))
    loss_NTE = torch.stack(losses, dim=-1)
    return Calibration(ids_NT, torch.ones_like(ids_NT, dtype=torch.bool), (-loss_NTE).softmax(-1))


def _losses(model: LanguageModel, ids_NT: Tensor) -> Tensor:
    """The loss of predicting the token after each, averaged over the tokens around it, [N, T]."""
    rows = []
    for ids_BT in ids_NT.split(max(1, _BATCH_TOKENS // ids_NT.shape[1])):
        with _precision():
            logits = model(ids_BT).logits_BTV
        loss_BT = F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none"
        )
        loss_BT = loss_BT.view(len(ids_BT), -1)
        width = min(_WINDOW, loss_BT.shape[1]) // 2 * 2 + 1
        near = F.avg_pool1d(loss_BT[:, None], width, 1, width // 2, count_include_pad=False)[:, 0]
        rows.append(F.pad(near, (0, 1), mode="replicate") if near.shape[1] > 1 else F.pad(near, (0, 1)))
    return torch.cat(rows)


@torch.no_grad()
def fit_router(
    merged: Merged, calibration: Calibration, mode: RouterMode, options: RouterInit, say: Say
) -> float:
    """Give every layer of ``merged`` its router; returns the merge's loss on the calibration text, in
    nats."""
    config = merged.config
    with torch.device("meta"):
        outer = LanguageModel(config.model_copy(update={"layers": 1}))
    merged.fill(outer.model.embed_tokens, "model.embed_tokens.")
    rope = (
        None if outer.model.rope is None else Rope(config.attention, config.attention.head_size(config.width))
    )
    batches = list(calibration.batches())
    streams = [outer.model.embed_tokens(calibration.ids_NT[b]) for b in batches]
    fit = fit_prompts if mode == "prompts" else fit_ridge
    for layer in range(config.layers):
        say(f"fitting the router of layer {layer + 1} of {config.layers}")
        merged.router_ED[layer] = torch.zeros(config.experts.count, config.width)
        with torch.device("meta"):
            block = Block(config, layer).eval()
        merged.fill(block, f"model.layers.{layer}.")
        inputs = []
        for n, b in enumerate(batches):
            real_BT = calibration.real_NT[b]
            position_BT = (real_BT.cumsum(1) - 1).clamp(min=0)
            allowed = allowed_keys(real_BT.shape[1], None, None if real_BT.all() else real_BT, real_BT.device)
            with _precision():
                streams[n], h_BTD = block.attend(
                    streams[n], None if rope is None else rope(position_BT), allowed, None, None
                )
            inputs.append(h_BTD.float())
        merged.router_ED[layer] = fit(inputs, calibration, options)
        assert isinstance(block.mlp, MoE)
        block.mlp.gate.weight.copy_(merged.router_ED[layer])
        for n, h_BTD in enumerate(inputs):
            with _precision():
                streams[n], _ = block.feed(streams[n], h_BTD, None)
    return _final_loss(merged, outer, streams, calibration)


def fit_ridge(inputs: list[Tensor], calibration: Calibration, options: RouterInit) -> Tensor:
    """The router [E, D] of least squares; solved in float64."""
    E, D = calibration.whose.shape[-1], inputs[0].shape[-1]
    share_E = _of_tokens(calibration).sum(0).double()
    weight_E = 1 / (E * share_E.clamp_(min=1e-9))
    a_DD, b_DE = torch.zeros(D, D, dtype=torch.float64), torch.zeros(D, E, dtype=torch.float64)
    for h_BTD, b in zip(inputs, calibration.batches(), strict=True):
        real = calibration.real_NT[b].flatten()
        x_RD, y_RE = h_BTD.flatten(0, 1)[real], _of_tokens(calibration, b)
        weight_R1 = (y_RE.double() @ weight_E)[:, None].float()
        a_DD += (x_RD.t() @ (x_RD * weight_R1)).double()
        b_DE += (x_RD.t() @ ((y_RE - 1 / E) * weight_R1)).double()
    a_DD += options.ridge * a_DD.diagonal().mean() * torch.eye(D, dtype=torch.float64)
    return _scaled(torch.linalg.solve(a_DD, b_DE).t().float(), inputs, calibration, options)


def fit_prompts(inputs: list[Tensor], calibration: Calibration, options: RouterInit) -> Tensor:
    """The router [E, D] whose rows are the mean inputs of each expert's prompts."""
    E, D = calibration.whose.shape[-1], inputs[0].shape[-1]
    sums_ED = {sign: torch.zeros(E, D) for sign in (1.0, -1.0)}
    counts_E1 = {sign: torch.zeros(E, 1) for sign in (1.0, -1.0)}
    for h_BTD, b in zip(inputs, calibration.batches(), strict=True):
        real_BT1 = calibration.real_NT[b][..., None].float()
        for sign in sums_ED:
            picked_BE = (calibration.whose[b] * sign > 0).float()
            sums_ED[sign] += picked_BE.t() @ (h_BTD * real_BT1).sum(1)
            counts_E1[sign] += picked_BE.t() @ real_BT1.sum(1)
    mean_ED = {sign: sums_ED[sign] / counts_E1[sign].clamp(min=1) for sign in sums_ED}
    rows_ED = mean_ED[1.0] - mean_ED[-1.0] * (counts_E1[-1.0] > 0)
    rows_ED = F.normalize(rows_ED - rows_ED.mean(0), dim=1)
    return _scaled(rows_ED, inputs, calibration, options)


def _of_tokens(calibration: Calibration, part: slice | None = None) -> Tensor:
    """Whose each real token is, [R, E]."""
    part = slice(None) if part is None else part
    whose, real_NT = calibration.whose[part], calibration.real_NT[part]
    whose_NTE = whose if whose.ndim == 3 else whose[:, None].expand(*real_NT.shape, whose.shape[-1])
    return whose_NTE[real_NT]


def _scaled(router_ED: Tensor, inputs: list[Tensor], calibration: Calibration, options: RouterInit) -> Tensor:
    """The router whose logits on the text have the wanted standard deviation."""
    reals = [calibration.real_NT[b] for b in calibration.batches()]
    logits = torch.cat([h_BTD[real] @ router_ED.t() for h_BTD, real in zip(inputs, reals, strict=True)])
    spread = float(logits.std())
    if spread <= 0:
        raise DataError(
            "the calibration text gives every expert the same logit; give the experts different text"
        )
    return router_ED * (options.scale / spread)


def _final_loss(
    merged: Merged, outer: LanguageModel, streams: list[Tensor], calibration: Calibration
) -> float:
    merged.fill(outer.model.norm, "model.norm.")
    if merged.config.tied:
        outer.lm_head.weight = outer.model.embed_tokens.weight
    else:
        merged.fill(outer.lm_head, "lm_head.")
    total, count = 0.0, 0
    for x_BTD, b in zip(streams, calibration.batches(), strict=True):
        real_BT = calibration.real_NT[b][:, 1:]
        hidden_RD = outer.model.norm(x_BTD)[:, :-1][real_BT]
        target_R = calibration.ids_NT[b][:, 1:][real_BT]
        total += float(token_losses(hidden_RD, outer.lm_head, target_R, max_logits=_MOST_LOGITS).sum())
        count += len(target_R)
    return total / max(count, 1)


def _precision() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16("cpu"))
