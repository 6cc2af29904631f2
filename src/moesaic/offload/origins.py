"""Where experts come from that were never trained here: a generator, or the files of a model.

Shape legend: L sparse layers, E experts of a layer, N pieces of an expert in files, P its parameters.
"""

import os
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.offload.records import ExpertShape, Layout, initial_weights

_DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
_SAMPLE = 64  # bytes at the beginning of each piece by which files are known again


class Origin(Protocol):
    """The weights of experts that have no record."""

    def fill(self, shape: ExpertShape, layer: int, expert: int, weights_P: Tensor) -> None:
        """Write an expert's weights, cast to the dtype of ``weights_P``. Raises CheckpointError."""
        ...

    def as_json(self) -> dict[str, Any]:
        """What tells this origin from others, and is enough to find it again."""
        ...


@dataclass(frozen=True)
class Generated:
    """A counter-based generator under ``seed``; ``std`` of the first matrix and of the last."""

    seed: int
    std: tuple[float, float]

    def fill(self, shape: ExpertShape, layer: int, expert: int, weights_P: Tensor) -> None:
        """As ``Origin.fill``."""
        values = initial_weights(shape, self.std, self.seed, layer, expert)
        weights_P.copy_(torch.from_numpy(values))

    def as_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "std": list(self.std)}


class Files:
    """Safetensors files of a model, read in place and never written. Piece n of an expert is its parameters
    ``bounds[n]`` to ``bounds[n + 1]``, which lie one after the other in file ``file_LEN`` from byte
    ``start_LEN`` on."""

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        dtype: torch.dtype,
        bounds: Sequence[int],
        file_LEN: NDArray[np.int64],
        start_LEN: NDArray[np.int64],
        fingerprint: int | None = None,
    ) -> None:
        """``files`` with their sizes in bytes; ``fingerprint`` as this attribute was before. Raises
        CheckpointError where a file is gone or another one now."""
        self.files, self.dtype, self.bounds = list(files), dtype, list(bounds)
        self.file_LEN, self.start_LEN = file_LEN, start_LEN
        self._sound_LE = np.zeros(file_LEN.shape[:2], bool)  # experts that were read once and found finite
        self._open: list[int] = []
        weakref.finalize(self, _close, self._open)
        for path, size in self.files:
            try:
                self._open.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                found = os.fstat(self._open[-1]).st_size
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); bring it back") from None
            if found != size:
                raise CheckpointError(f"{path}: has {found} bytes and had {size}; bring that file back")

        self.fingerprint = self._sampled()
        if fingerprint not in (None, self.fingerprint):
            raise CheckpointError(
                f"{self.files[0][0]}: its experts are others now than when this run began from them; bring "
                "those files back"
            )

    def _sampled(self) -> int:
        """A CRC-32 of the first bytes of every piece of every expert."""
        crc, sample = 0, bytearray(_SAMPLE)
        for file, start in zip(self.file_LEN.flat, self.start_LEN.flat, strict=True):
            self._read(int(file), int(start), memoryview(sample))
            crc = zlib.crc32(sample, crc)
        return crc

    def fill(self, shape: ExpertShape, layer: int, expert: int, weights_P: Tensor) -> None:
        """As ``Origin.fill``; NaN and infinities are refused when an expert is first read."""
        for n, (begin, end) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            to = weights_P[begin:end]
            into = to if to.dtype == self.dtype else torch.empty(end - begin, dtype=self.dtype)
            file = int(self.file_LEN[layer, expert, n])
            view = memoryview(into.view(torch.uint8).numpy().data)
            self._read(file, int(self.start_LEN[layer, expert, n]), view)
            if into is not to:
                to.copy_(into)
        if not self._sound_LE[layer, expert] and not torch.stack(weights_P.aminmax()).isfinite().all():
            path = self.files[int(self.file_LEN[layer, expert, 0])][0]
            raise CheckpointError(f"{path}: expert {expert} of layer {layer} holds NaN or infinity")
        self._sound_LE[layer, expert] = True

    def _read(self, file: int, start: int, left: memoryview) -> None:
        try:
            while left:  # one read gives at most 2 GB
                count = os.preadv(self._open[file], [left], start)
                if not count:
                    raise CheckpointError(f"{self.files[file][0]}: was cut while it was read")
                left, start = left[count:], start + count
        except OSError as error:
            raise CheckpointError(f"{self.files[file][0]}: cannot be read ({error.strerror})") from None

    def as_json(self) -> dict[str, Any]:
        return {
            "files": [[str(path), size] for path, size in self.files],
            "dtype": str(self.dtype).removeprefix("torch."),
            "bounds": self.bounds,
            "places": [self.file_LEN.tolist(), self.start_LEN.tolist()],
            "fingerprint": self.fingerprint,
        }


def origin_of(value: dict[str, Any]) -> Origin:
    """The origin that ``as_json`` described. Raises CheckpointError where its files are gone."""
    if "seed" in value:
        first, last = value["std"]
        return Generated(value["seed"], (first, last))
    files = [(Path(path), int(size)) for path, size in value["files"]]
    file_LEN, start_LEN = (np.array(table, np.int64) for table in value["places"])
    dtype = _DTYPES[value["dtype"]]
    return Files(files, dtype, value["bounds"], file_LEN, start_LEN, value["fingerprint"])


class Unchanging:
    """An origin as records of weights alone, to be read through a pool."""

    def __init__(self, origin: Origin, layout: Layout, layers: int, experts: int) -> None:
        self.origin, self.layout, self.layers, self.experts = origin, layout, layers, experts
        self.record = layout.bytes

    def read(self, layer: int, expert: int, into: memoryview) -> None:
        """Fill ``into`` with an expert's record. Raises CheckpointError."""
        record = torch.frombuffer(into, dtype=torch.uint8)[None]
        self.origin.fill(self.layout.shape, layer, expert, self.layout.weights_of(record)[0])

    def place_for(self, layer: int, expert: int) -> int:
        raise AssertionError("nothing here is written")

    def write(self, layer: int, expert: int, place: int, data: memoryview) -> None:
        raise AssertionError("nothing here is written")

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Files are closed with the last that knows them."""


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
