"""Dense models out of donors: an adapter as a whole model, the average of several."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from moesaic.merge.donors import Donor
from moesaic.weights.carried import carried_files
from moesaic.weights.contents import Later
from moesaic.weights.hf import stop_ids, write_tensors
from moesaic.weights.shards import real_file


def write_dense(donor: Donor, out: Path) -> None:
    """A donor as a directory of its own: an adapter's change is applied. Raises as ``write_hf``."""
    _write(donor, donor.read, out)


def write_average(base: Donor, experts: list[Donor], out: Path) -> None:
    """The uniform average of the experts, every tensor of it; of a vocabulary that not all have, the rows
    that all have, the others being the base's. Raises as ``write_hf``."""

    def mean(name: str) -> Tensor:
        total = base.read(name).clone()
        parts = [expert.read(name) for expert in experts]
        rows = min(len(total), *(len(part) for part in parts))
        total[:rows] = torch.stack([part[:rows] for part in parts]).mean(0)
        return total

    _write(base, mean, out)


def _write(like: Donor, make: Callable[[str], Tensor], out: Path) -> None:
    found, files = like.found, {}
    for directory in dict.fromkeys(
        (found.shards.directory, like.directory)
    ):  # an adapter lies beside no model
        files.update(carried_files(directory))
        if (directory / "tokenizer.json").exists():
            files["tokenizer.json"] = real_file(directory / "tokenizer.json").read_bytes()

    def tensors() -> Iterator[tuple[str, Later]]:
        for name, parameter in found.model.named_parameters():
            yield name, Later(parameter.shape, found.dtype, _maker(make, name, found.dtype))

    ends = sorted(stop_ids(found.shards.directory))
    extra = {"eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    write_tensors(out, found.config, found.family, tensors(), found.dtype, files, extra)


def _maker(make: Callable[[str], Tensor], name: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: make(name).to(dtype)
