"""Checkpoints: directories of tensors, JSON and bytes that are either whole or not believed.

``write_checkpoint`` writes every file into a hidden sibling, syncs and hashes each, writes
``manifest.json`` last, reads all of it back, and only then renames the directory into place. A
reader believes a directory whose files are exactly those of the manifest, byte for byte, so a kill
at any moment, a full disk and a flipped bit all end in "use the one before". Nothing here knows
what a model or an optimizer is, and nothing is ever pickled.

Names in ``<run>/checkpoints``: ``step-00000100`` is a checkpoint; ``.step-00000100.tmp-<pid>`` is
rubbish of the process ``pid``; ``.step-00000100.old-<pid>`` is a whole checkpoint that stepped
aside while its successor of the same step was put in its place.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor

from moesaic.config import Options
from moesaic.errors import CheckpointError, RecipeError, ResourceError
from moesaic.files import explain, explained, free_bytes, human_size, sync_directory, write_atomic, write_new
from moesaic.weights.contents import Contents, Part, parts_of
from moesaic.weights.manifest import Entry, is_valid, listed, read_checked, verify, write_manifest

_STEP = r"step-\d{8,}"
_DISK_BLOCK = 4096


class CheckpointOptions(Options):
    """A checkpoint every ``every`` steps, of which the newest ``keep`` stay on disk.

    At least two are kept: deleting the only good one is dangerous.
    """

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=2)


def save(run: Path, step: int, contents: Contents, keep: int) -> Path:
    """Write ``<run>/checkpoints/step-<step>``, point ``<run>/latest`` at it, prune to ``keep``.

    The new one has been read back before anything older is touched, and counts as one of ``keep``
    (at least 2). Raises ResourceError (disk full), RecipeError (directory not writable) and
    CheckpointError (the disk does not give back what was written); the older ones are then as before.
    """
    if keep < 2:
        raise ValueError("keep at least 2 checkpoints: deleting the only good one is dangerous")
    directory = run / "checkpoints" / step_name(step)
    write_checkpoint(directory, contents)
    write_atomic(run / "latest", f"{directory.name}\n")
    with explained(directory.parent, "old checkpoints cannot be removed"):
        _prune(directory, keep)
    return directory


def newest_valid(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of ``run`` that verifies, or None where there is none at all.

    Calls ``say`` with one sentence for each newer one that is damaged. Nothing is changed on disk.
    The path can be a hidden one (see the top of the file); ``step_of`` reads the step of both.
    Raises CheckpointError if there are checkpoints but none is whole.
    """
    damaged: list[tuple[Path, str]] = []
    for path in _newest_first(run / "checkpoints"):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append((path, str(error)))
            continue
        for bad, reason in damaged:
            say(f"checkpoint {bad.name} is damaged ({reason}); falling back to {path.name}")
        return path
    if not damaged:
        return None
    raise CheckpointError(
        f"{run}: none of its {len(damaged)} checkpoint(s) is whole ({damaged[0][1]}); restore one from a "
        f"copy, or remove {run / 'checkpoints'} to begin again"
    )


def step_name(step: int) -> str:
    """The directory name of ``step``: step-00000100."""
    if step < 0:
        raise ValueError(f"a checkpoint's step is not negative: {step}")
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory, in place or stepped aside."""
    match = re.fullmatch(rf"({_STEP})|\.({_STEP})\.old-\d+", path.name)
    if not match:
        raise ValueError(f"{path}: not the name of a checkpoint")
    return int((match[1] or match[2]).removeprefix("step-"))


def write_checkpoint(directory: Path, contents: Contents) -> None:
    """Write ``contents`` as the checkpoint ``directory``, replacing one of that name if it is there.

    At every instant a whole old or a whole new checkpoint exists. Tensors may be of any layout in
    memory and on any device; two names of one tensor are written twice. Raises as ``save``, and
    ValueError for contents that no checkpoint can hold.
    """
    parts = parts_of(contents)
    needed = sum(_DISK_BLOCK * (2 + part.size // _DISK_BLOCK) for part in parts) + 2 * _DISK_BLOCK
    problem = f"checkpoint needs {human_size(needed)}"
    parent, temporary = directory.parent, _beside(directory, "tmp")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        sync_directory(parent.parent)
        _settle(parent, _STEP if re.fullmatch(_STEP, directory.name) else re.escape(directory.name))
        if (free := free_bytes(parent)) < needed:
            raise ResourceError(f"{problem}, {parent} has {human_size(free)} free; {_last_good(parent)}")
        _write_files(temporary, parts)
        _read_back(temporary, directory)
        _put_in_place(temporary, directory)
    except BaseException as error:
        # Best effort: what cannot be removed now is removed by the next writer.
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise explain(error, parent, problem, _last_good(parent)) from error
        raise


def read_checkpoint(directory: Path) -> Contents:
    """Verify a checkpoint and read all of it; tensors are private maps of their files, on the CPU.

    Raises CheckpointError naming the file and what is wrong.
    """
    contents = Contents()
    for name, entry in listed(directory).items():
        if entry.kind == "tensors":
            contents.tensors[name] = _load_tensors(directory / name, entry)
        elif entry.kind == "json":
            contents.json[name] = _load_json(directory / name, entry)
        else:
            contents.files[name] = read_checked(directory / name, entry, keep=True)
    return contents


def read_tensors(directory: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file, which alone is verified besides the manifest. Raises CheckpointError."""
    return _load_tensors(directory / name, _entry(directory, name, "tensors"))


def read_json(directory: Path, name: str) -> Any:
    """One JSON file, which alone is verified besides the manifest. Raises CheckpointError."""
    return _load_json(directory / name, _entry(directory, name, "json"))


# Writing


def _write_files(temporary: Path, parts: list[Part]) -> None:
    os.mkdir(temporary)
    entries = {}
    for part in parts:
        size, sha256 = write_new(temporary / part.name, part.blocks())
        entries[part.name] = Entry(part.kind, size, sha256)
    write_manifest(temporary, entries)
    sync_directory(temporary)


def _read_back(temporary: Path, directory: Path) -> None:
    try:
        verify(temporary)
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory}: the disk does not give back what was written ({error}); use another disk"
        ) from None


def _put_in_place(temporary: Path, directory: Path) -> None:
    if not os.path.lexists(directory):
        os.rename(temporary, directory)
        sync_directory(directory.parent)
        return
    if directory.is_symlink() or not directory.is_dir():
        raise RecipeError(f"{directory}: is in the way of a checkpoint and is not a directory; move it away")
    aside = _beside(directory, "old")
    os.rename(directory, aside)
    try:
        os.rename(temporary, directory)
    except BaseException:
        os.rename(aside, directory)
        raise
    sync_directory(directory.parent)
    # The new one is whole and durable; what stays of the old one is removed by the next writer.
    shutil.rmtree(aside, ignore_errors=True)


def _prune(written: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest that verify, ``written`` among them.

    Damaged ones newer than those are left for a person to look at.
    """
    paths = [path for path in _newest_first(written.parent) if not path.name.startswith(".")]
    good = 1
    for path in paths if len(paths) > keep else []:
        if path == written:
            continue
        if good < keep:
            good += is_valid(path)
        else:
            trash = _beside(path, "tmp")  # so that a kill leaves rubbish, not half a checkpoint
            os.rename(path, trash)
            shutil.rmtree(trash)


def _settle(parent: Path, names: str) -> None:
    """Finish what dead writers of the checkpoints matching ``names`` left half done in ``parent``."""
    for name in sorted(os.listdir(parent), reverse=True):  # .tmp before .old, which may need its name
        match = re.fullmatch(rf"\.({names})\.(tmp|old)-(\d+)", name)
        leftover = parent / name
        if not match or leftover.is_symlink() or not leftover.is_dir() or _is_another_alive(int(match[3])):
            continue
        final, stepped_aside = parent / match[1], match[2] == "old"
        if stepped_aside and not os.path.lexists(final):
            os.rename(leftover, final)
            sync_directory(parent)
            continue
        if stepped_aside and not is_valid(final) and is_valid(leftover):
            trash = _beside(final, "tmp")
            os.rename(final, trash)
            os.rename(leftover, final)
            sync_directory(parent)
            leftover = trash
        shutil.rmtree(leftover)


def _beside(directory: Path, what: str) -> Path:
    return directory.with_name(f".{directory.name}.{what}-{os.getpid()}")


def _is_another_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


# Reading


def _newest_first(parent: Path) -> list[Path]:
    """All in ``parent`` that may be a checkpoint; of one step, the one in place comes first."""
    try:
        paths = [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{parent}: cannot be read: {error.strerror}") from None
    paths = [path for path in paths if re.fullmatch(rf"{_STEP}|\.{_STEP}\.old-\d+", path.name)]
    return sorted(paths, key=lambda path: (-step_of(path), path.name.startswith("."), path.name))


def _last_good(parent: Path) -> str:
    """Half a sentence; what was put in place was read back then, so its manifest alone is asked."""
    try:
        paths = _newest_first(parent)
    except CheckpointError:
        paths = []
    for path in paths:
        try:
            listed(path)
        except CheckpointError:
            continue
        return f"the last good checkpoint is {path}"
    return "there is no earlier checkpoint"


def _entry(directory: Path, name: str, kind: str) -> Entry:
    entry = listed(directory).get(name)
    if entry is None or entry.kind != kind:
        raise CheckpointError(f"{directory}: has no {kind} file {name}")
    return entry


def _load_tensors(path: Path, entry: Entry) -> dict[str, Tensor]:
    read_checked(path, entry, keep=False)
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file that can be read: {error}") from None


def _load_json(path: Path, entry: Entry) -> Any:
    data = read_checked(path, entry, keep=True)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
