"""What a checkpoint consists of, and the bytes that each of its files becomes.

Sizes are known before the first byte is made, so that a full disk is found before anything is written.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.weights.manifest import is_plain

_HEADER_LIMIT = 100_000_000  # bytes; readers of safetensors refuse more
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Later:
    """A tensor that is made when its turn comes to be written, so that what is written may be larger than
    memory. ``make`` must give the same each time: it has ``shape`` and ``dtype``."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass(frozen=True)
class Contents:
    """The files of a checkpoint by plain file name.

    ``tensors`` end in ``.safetensors`` and ``json`` in ``.json``; ``files`` are copied as they are; ``later``
    is as ``tensors``, and is never read.
    JSON has no tuples (read back as lists), no keys but strings, and no NaN or infinity (refused).
    """

    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    later: dict[str, dict[str, Later]] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """A file to write: its exact size is known before its first byte is made."""

    name: str
    kind: str
    size: int
    blocks: Callable[[], Iterator[bytes | memoryview]]


def parts_of(contents: Contents) -> list[Part]:
    """The files to write, by name. Raises ValueError for contents that no checkpoint can hold."""
    now = {name: _as_later(name, tensors) for name, tensors in contents.tensors.items()}
    parts = [_tensor_part(name, tensors) for name, tensors in (now | contents.later).items()]
    for name, value in contents.json.items():
        data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
        parts.append(_bytes_part(name, "json", data))
    parts += [_bytes_part(name, "bytes", data) for name, data in contents.files.items()]
    suffixes = {"tensors": ".safetensors", "json": ".json", "bytes": ""}
    for part in parts:
        if not is_plain(part.name) or not part.name.endswith(suffixes[part.kind]):
            raise ValueError(f"{part.name!r}: not a plain file name for {part.kind}")
    if len({part.name for part in parts}) < len(parts):
        raise ValueError(f"a file name is used twice: {sorted(part.name for part in parts)}")
    return sorted(parts, key=lambda part: part.name)


def _bytes_part(name: str, kind: str, data: bytes) -> Part:
    return Part(name, kind, len(data), lambda: iter([data]))


def _as_later(name: str, tensors: dict[str, Tensor]) -> dict[str, Later]:
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name}: {key} is {tensor.layout} on {tensor.device}: not storable")
    return {key: Later(t.shape, t.dtype, lambda t=t: t) for key, t in tensors.items()}  # type: ignore[misc]


def _tensor_part(name: str, tensors: dict[str, Later]) -> Part:
    """A safetensors file as a stream: the library would need every byte in memory once more, hide the
    errno of a full disk, and leave the file to be read again for its hash."""
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))  # keeps all of them aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers 4 refuses the file
    end = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: {key} is {tensor.dtype}: not storable")
        start, end = end, end + tensor.shape.numel() * tensor.dtype.itemsize
        header[key] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if "__metadata__" in tensors or len(text) > _HEADER_LIMIT:
        raise ValueError(f"{name}: {len(header)} tensors do not fit into a safetensors header")
    head = len(text).to_bytes(8, "little") + text

    def blocks() -> Iterator[bytes | memoryview]:
        yield head
        for key in order:  # one tensor at a time: a copy off the device or into order is short-lived
            flat = tensors[key].make().detach().cpu().contiguous().flatten()
            yield flat.view(torch.uint8).numpy().data

    return Part(name, "tensors", len(head) + end, blocks)
