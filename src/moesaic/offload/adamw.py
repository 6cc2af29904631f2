"""AdamW on experts, in records or as rows in memory: by the kernels of native/adamw.cpp, or by PyTorch.

Shape legend: S slots, B bytes of a record, U experts at work, P parameters of an expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.native import adamw, library
from moesaic.native.adamw import Scalars
from moesaic.offload.records import Layout, Matrices, rounded_to_bf16


def gather(
    layout: Layout, records_SB: Tensor, slots: Sequence[int], scalars: Sequence[Scalars], out: Matrices
) -> None:
    """Write the matrices in some slots, as they are once caught up, into ``out``, U experts, contiguous; the
    records stay as they are."""
    if layout.moments is not None and library.available():
        adamw.gather(records_SB, slots, (layout.weights, layout.moments), scalars, out)
        return
    stored = layout.weights_of(records_SB)
    if any(one.pushes or one.keep != 1.0 for one in scalars):
        stored, m, v = _read(layout, records_SB[list(slots)])
        for n, one in enumerate(scalars):
            _catch_up(stored[n], m[n], v[n], one)
        slots = range(len(slots))
    for to, matrices in zip(out, layout.shape.matrices(stored), strict=True):
        for n, slot in enumerate(slots):
            to[n].copy_(matrices[slot])


def update(
    layout: Layout, records_SB: Tensor, slots: Sequence[int], scalars: Sequence[Scalars], gradients: Matrices
) -> None:
    """Catch up and make a step with these gradients, float32 or bfloat16 and contiguous, in place."""
    assert layout.moments is not None
    if library.available():
        adamw.update(records_SB, slots, (layout.weights, layout.moments), scalars, gradients)
        return
    where = list(slots)
    records = records_SB[where]
    p, m, v = _read(layout, records)
    gradient_UP = torch.cat([part.flatten(1) for part in gradients], dim=1).float()
    _update(p, m, v, gradient_UP, scalars)
    if layout.weights == "bf16":
        p = torch.stack([rounded_to_bf16(p[n], one.seed) for n, one in enumerate(scalars)])
    layout.weights_of(records).copy_(p)
    layout.write_moments(records, m, v)
    records_SB[where] = records


def update_rows(
    p_UP: Tensor, m_UP: Tensor, v_UP: Tensor, gradient_UP: Tensor, scalars: Sequence[Scalars]
) -> None:
    """The same for weights and moments as rows of one dtype, in place."""
    if p_UP.device.type != "cpu" or p_UP.dtype != torch.float32 or not library.available():
        _update(p_UP, m_UP, v_UP, gradient_UP, scalars)
        return
    U, P = p_UP.shape
    records = torch.cat([p_UP, m_UP, v_UP], dim=1)
    whole = gradient_UP.contiguous(), gradient_UP.new_empty(U, 0)
    adamw.update(records.view(torch.uint8), range(U), ("fp32", "fp32"), scalars, whole)
    for to, part in zip((p_UP, m_UP, v_UP), records.split(P, dim=1), strict=True):
        to.copy_(part)


def _update(
    p_UP: Tensor, m_UP: Tensor, v_UP: Tensor, gradient_UP: Tensor, scalars: Sequence[Scalars]
) -> None:
    for n, one in enumerate(scalars):
        _catch_up(p_UP[n], m_UP[n], v_UP[n], one)
        step(p_UP[n], m_UP[n], v_UP[n], gradient_UP[n], one)


def step(p: Tensor, m: Tensor, v: Tensor, gradient: Tensor, by: Scalars) -> None:
    """One step of AdamW, in place, all float32."""
    gradient = gradient * by.scale
    p.mul_(by.decay)
    m.lerp_(gradient, 1 - by.beta1)
    v.mul_(by.beta2).addcmul_(gradient, gradient, value=1 - by.beta2)
    p.addcdiv_(m, v.sqrt().div_(by.root).add_(by.eps), value=-by.rate)


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
