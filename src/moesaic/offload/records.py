"""One expert as bytes: its weights, its AdamW moments, and how both become numbers and bytes again.

Shape legend: S records, P parameters of one expert, N blocks of 256 of them.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moesaic.model.experts import FFNKind

WeightKind = Literal["fp32", "bf16"]
MomentKind = Literal["fp32", "bf16", "int8"]

ALIGNED = 4096  # bytes; what direct I/O asks of addresses, offsets and lengths
_BLOCK = 256  # parameters that share a scale (Dettmers et al. 2022, arXiv 2110.02861, use blocks too)
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class ExpertShape:
    """The matrices of one expert without biases: the first [G, D] (gate and up for SwiGLU), the last [D,
    H]."""

    kind: FFNKind
    width: int
    hidden: int

    @property
    def inner(self) -> int:
        return 2 * self.hidden if self.kind == "swiglu" else self.hidden

    @property
    def parameters(self) -> int:
        return self.inner * self.width + self.width * self.hidden

    def matrices(self, weights_SP: Tensor) -> tuple[Tensor, Tensor]:
        """The first matrices [S, G, D] and the last [S, D, H] out of rows of parameters."""
        cut = self.inner * self.width
        first = weights_SP[:, :cut].unflatten(1, (self.inner, self.width))
        return first, weights_SP[:, cut:].unflatten(1, (self.width, self.hidden))


@dataclass(frozen=True)
class Layout:
    """Where things are in a record. ``moments`` None: weights alone, for a store that is only read."""

    shape: ExpertShape
    weights: WeightKind
    moments: MomentKind | None

    @property
    def sizes(self) -> list[int]:
        """Bytes of the weights, and of the first and second moments with their scales."""
        P = self.shape.parameters
        weights = P * _DTYPES[self.weights].itemsize
        if self.moments is None:
            return [weights]
        scales = 4 * -(-P // _BLOCK) if self.moments == "int8" else 0
        moment = -(-P * _DTYPES[self.moments].itemsize // 4) * 4 + scales
        return [-(-weights // 4) * 4, moment, moment]

    @property
    def bytes(self) -> int:
        """Of one record, a multiple of what direct I/O asks for."""
        return -(-sum(self.sizes) // ALIGNED) * ALIGNED

    def weights_of(self, records: Tensor) -> Tensor:
        """The weights in records, uint8 [S, bytes], as a view [S, P]."""
        P = self.shape.parameters
        dtype = _DTYPES[self.weights]
        return records[:, : P * dtype.itemsize].view(dtype)

    def read_moments(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moments in float32, [S, P] each."""
        start = self.sizes[0]
        parts = [records[:, start + i * self.sizes[1] : start + (i + 1) * self.sizes[1]] for i in range(2)]
        if self.moments != "int8":
            dtype, P = _DTYPES[str(self.moments)], self.shape.parameters
            first, second = (part[:, : P * dtype.itemsize].view(dtype).float() for part in parts)
            return first, second
        steps_m, scale_m = self._int8(parts[0])
        steps_v, scale_v = self._int8(parts[1])
        # Of the second moment the root is stored, in 255 steps from 0.
        root = (steps_v.view(torch.uint8).float() * _spread(scale_v, steps_v.shape[1])).square_()
        return steps_m.float() * _spread(scale_m, steps_m.shape[1]), root

    def write_moments(self, records: Tensor, first: Tensor, second: Tensor) -> None:
        """Put float32 moments [S, P] into records, rounded as the layout says."""
        start = self.sizes[0]
        for i, moment in enumerate((first, second)):
            part = records[:, start + i * self.sizes[1] : start + (i + 1) * self.sizes[1]]
            if self.moments != "int8":
                dtype = _DTYPES[str(self.moments)]
                part[:, : self.shape.parameters * dtype.itemsize].view(dtype).copy_(moment)
                continue
            steps, scales = self._int8(part)
            values = moment.sqrt() if i else moment
            most, P = (255 if i else 127), values.shape[1]
            scale = _largest(values) / most
            ratio = values / _spread(scale, P).clamp_(min=1e-38)
            # Upwards, so that a small second moment is never zero: a step is then too short, not too long.
            rounded = ratio.sub_(1e-4).ceil_().clamp_(0, 255) if i else ratio.round_()
            (steps.view(torch.uint8) if i else steps).copy_(rounded)
            scales.copy_(scale)

    def _int8(self, part: Tensor) -> tuple[Tensor, Tensor]:
        """Steps int8 [S, P] and scales float32 [S, N], as views."""
        P = self.shape.parameters
        end = -(-P // 4) * 4
        return part[:, :P].view(torch.int8), part[:, end : end + 4 * -(-P // _BLOCK)].view(torch.float32)


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude of each block, [S, N]."""
    S, P = values.shape
    padded = torch.nn.functional.pad(values, (0, -P % _BLOCK))
    return padded.view(S, -1, _BLOCK).abs().amax(2)


def _spread(scale_SN: Tensor, P: int) -> Tensor:
    """Each block's scale for each of its parameters, [S, P]."""
    return scale_SN.repeat_interleave(_BLOCK, dim=1)[:, :P].contiguous()


def initial_weights(
    shape: ExpertShape, std: tuple[float, float], seed: int, layer: int, expert: int
) -> np.ndarray:
    """The weights of an expert that was never trained, float32 [P]: normal, of a counter-based generator
    (Salmon et al. 2011), so that each follows from (seed, layer, expert) alone. ``std``: of the first matrix
    and of the last."""
    key = np.array([seed, layer * 2**32 + expert], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key))
    weights: np.ndarray = generator.standard_normal(shape.parameters, dtype=np.float32)
    cut = shape.inner * shape.width
    weights[:cut] *= std[0]
    weights[cut:] *= std[1]
    return weights


def rounded_to_bf16(values: Tensor, seed: int) -> Tensor:
    """Float32 to bfloat16, up or down with the odds that make the mean right (stochastic rounding): to the
    nearest, an update below 2^-9 of a weight would be lost every time."""
    generator = torch.Generator().manual_seed(seed)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(2**16)).view(torch.float32).bfloat16()
