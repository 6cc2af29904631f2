"""One expert as bytes: its weights, its AdamW moments, and how both become numbers and bytes again.

Shape legend: S records, U experts, P parameters of one expert, N blocks of 256 of them, D width, G and H the
hidden width before and after the activation.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.model.experts import FFNKind
from moesaic.native import library
from moesaic.native.normal import normal_numbers

WeightKind = Literal["fp32", "bf16"]
MomentKind = Literal["fp32", "bf16", "int8"]

ALIGNED = 4096  # bytes; what direct I/O asks of addresses, offsets and lengths
_BLOCK = 256  # parameters that share a scale (Dettmers et al. 2022, arXiv 2110.02861, use blocks too)
Matrices = tuple[Tensor, Tensor]  # of some experts: the first [U, G, D], the last [U, D, H]

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

    def matrices(self, weights_SP: Tensor) -> Matrices:
        """The first matrices [S, G, D] and the last [S, D, H] out of rows of parameters."""
        cut = self.inner * self.width
        first = weights_SP[:, :cut].unflatten(1, (self.inner, self.width))
        return first, weights_SP[:, cut:].unflatten(1, (self.width, self.hidden))

    def stacks(self, experts: int, dtype: torch.dtype) -> Matrices:
        """Room for the first matrices [S, G, D] and the last [S, D, H] of so many experts."""
        first = torch.empty(experts, self.inner, self.width, dtype=dtype)
        return first, torch.empty(experts, self.width, self.hidden, dtype=dtype)


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
) -> NDArray[np.float32]:
    """The weights of an expert that was never trained, float32 [P]: normal, to 65,536 quantiles, of a
    counter-based generator, so that each follows from (seed, layer, expert) alone. ``std``: of the first
    matrix and of the last."""
    count = shape.parameters
    if library.available():
        weights = normal_numbers(count, _quantiles(), seed, layer, expert)
    else:
        weights = _quantiles()[_philox(-(-count // 8), seed, layer, expert)[:count]]
    cut = shape.inner * shape.width
    weights[:cut] *= np.float32(std[0])
    weights[cut:] *= np.float32(std[1])
    return weights


@cache
def _quantiles() -> NDArray[np.float32]:
    """The middles of 65,536 equally likely intervals of the normal distribution, to a millionth, so that it
    is the same however a library rounds."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    values: NDArray[np.float32] = (torch.special.ndtri(middles) * 2**20).round_().div_(2**20).float().numpy()
    return values


def _philox(blocks: int, seed: int, layer: int, expert: int) -> NDArray[np.uint16]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3) as native/normal.cpp has it: eight numbers of 16 bits
    for each block."""
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    c = [np.arange(blocks, dtype=np.uint64), *(np.full(blocks, v, np.uint64) for v in (0, expert, layer))]
    keys = [seed % 2**32, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> shift) ^ c[1] ^ np.uint64(keys[0]),
            b & low,
            (a >> shift) ^ c[3] ^ np.uint64(keys[1]),
            a & low,
        ]
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return np.stack(c, axis=1).astype("<u4").reshape(-1).view("<u2")


def rounded_to_bf16(values: Tensor, seed: int) -> Tensor:
    """Float32 to bfloat16, up or down with the odds that make the mean right (stochastic rounding): to the
    nearest, an update below 2^-9 of a weight would be lost every time."""
    generator = torch.Generator().manual_seed(seed)
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(2**16)).view(torch.float32).bfloat16()
