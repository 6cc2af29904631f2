"""AdamW on the records of experts: by the kernels of native/adamw.cpp, or the same by PyTorch.

Shape legend: S slots, U experts at work, P parameters of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.native import adamw, library
from moesaic.native.adamw import Scalars
from moesaic.offload.records import Layout, rounded_to_bf16


def gather(
    layout: Layout, records_SB: Tensor, slots: Sequence[int], scalars: Sequence[Scalars], dtype: torch.dtype
) -> Tensor:
    """The weights in some slots as they are once caught up, [U, P], a copy; the records stay as they are."""
    moved = any(one.pushes or one.keep != 1.0 for one in scalars)
    if layout.moments is not None and library.available():
        kinds = layout.weights, layout.moments
        return adamw.gather(records_SB, slots, kinds, scalars, layout.shape.parameters, dtype)
    weights = layout.weights_of(records_SB)[list(slots)]
    if not moved:
        return weights.to(dtype)
    p, m, v = _read(layout, records_SB[list(slots)])
    for n, one in enumerate(scalars):
        _catch_up(p[n], m[n], v[n], one)
    return p.to(dtype)


def update(
    layout: Layout, records_SB: Tensor, slots: Sequence[int], scalars: Sequence[Scalars], gradient_UP: Tensor
) -> None:
    """Catch up and make a step with these gradients, float32, in place."""
    assert layout.moments is not None
    if library.available():
        adamw.update(records_SB, slots, (layout.weights, layout.moments), scalars, gradient_UP)
        return
    where = list(slots)
    records = records_SB[where]
    p, m, v = _read(layout, records)
    for n, one in enumerate(scalars):
        _catch_up(p[n], m[n], v[n], one)
        gradient = gradient_UP[n] * one.scale
        p[n].mul_(one.decay)
        m[n].lerp_(gradient, 1 - one.beta1)
        v[n].mul_(one.beta2).addcmul_(gradient, gradient, value=1 - one.beta2)
        p[n].addcdiv_(m[n], v[n].sqrt().div_(one.root).add_(one.eps), value=-one.rate)
    if layout.weights == "bf16":
        p = torch.stack([rounded_to_bf16(p[n], one.seed) for n, one in enumerate(scalars)])
    layout.weights_of(records).copy_(p)
    layout.write_moments(records, m, v)
    records_SB[where] = records


def _read(layout: Layout, records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and moments in float32, [U, P] each, copies."""
    first, second = layout.read_moments(records)
    return layout.weights_of(records).float(), first.contiguous(), second.contiguous()


def _catch_up(p: Tensor, m: Tensor, v: Tensor, by: Scalars) -> None:
    p.mul_(by.keep)
    root = v.sqrt()
    for push, eps in by.pushes:
        p.addcdiv_(m, root + eps, value=-push)
    m.mul_(by.first)
    v.mul_(by.second)
