"""Compile the kernels beside this file once per machine, and load them.

``-march=native`` is what makes them worth having, so no wheel could carry them: they are compiled when first
asked for (about a second) and kept under the user's cache directory. Without a C++ compiler everything works
by PyTorch's own kernels; ``moesaic env`` says which, and why.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch  # noqa: F401  # its OpenMP must be in the process first: the kernels then share its threads

FOLDER = Path(__file__).parent
# No -ffast-math: linked into a library it makes the whole process flush denormal numbers to zero.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
SWITCH = "MOESAIC_NATIVE"


class NotBuilt(Exception):
    """Why there are no kernels here, in a few words."""


@functools.cache
def available() -> bool:
    """Whether there are kernels here; compiles them if there could be."""
    return _reason() == ""


@functools.cache
def kernel(name: str, arguments: int) -> Callable[..., None]:
    """One function of the library, which must be there; pointers and sizes are both 64 bits wide."""
    function = getattr(_load(), name)
    function.argtypes, function.restype = [ctypes.c_void_p] * arguments, None
    return function  # type: ignore[no-any-return]


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An argument of a kernel that is a list of int64."""
    return (ctypes.c_int64 * len(values))(*values)


def state() -> str:
    """One line for ``moesaic env``: what computes products of few rows here."""
    reason = _reason()
    return f"PyTorch ({reason})" if reason else "compiled kernels"


@functools.cache
def _reason() -> str:
    try:
        _load()
    except NotBuilt as error:
        return str(error)
    return ""


@functools.cache
def _load() -> ctypes.CDLL:
    if os.environ.get(SWITCH) == "0":
        raise NotBuilt(f"{SWITCH}=0")
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None
    )
    if compiler is None:
        raise NotBuilt("no C++ compiler")
    name = f"kernels-{_fingerprint(compiler)}.so"
    try:
        folder = _private(_cache())
        if not (folder / name).exists():
            _compile(compiler, folder / name)
        loaded = ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise NotBuilt(str(error)) from None
    if _openmp_runtimes() > 1:  # two pools of spinning threads are slower than either
        raise NotBuilt("another OpenMP than PyTorch's")
    return loaded


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic" / "kernels"


def _private(folder: Path) -> Path:
    """``folder``, made if need be; what is loaded from it runs, so nobody else may write there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = folder.stat()
        if os.access(folder, os.W_OK) and facts.st_uid == os.getuid() and not facts.st_mode & 0o022:
            return folder
    except (OSError, AttributeError):  # a read-only home, or a system without users
        pass
    return Path(tempfile.mkdtemp(prefix="moesaic-"))


def _fingerprint(compiler: str) -> str:
    """Changes with the source, the flags, the compiler and the processor."""
    facts = os.stat(compiler)
    parts = [*FLAGS, compiler, facts.st_mtime_ns, facts.st_size]
    parts += [path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.[ch]*"))]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        parts += sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        parts.append(platform.processor())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _compile(compiler: str, target: Path) -> None:
    """Several processes may do this at once: each writes its own file and renames it."""
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        words = [compiler, *FLAGS, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(draft)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        if done.returncode:
            complaint = (done.stderr.strip().splitlines() or ["no output"])[0]
            raise NotBuilt(f"{Path(compiler).name}: {complaint}")
        draft.replace(target)
    except subprocess.TimeoutExpired:
        raise NotBuilt(f"{Path(compiler).name} took more than 120 s") from None
    finally:
        draft.unlink(missing_ok=True)


def _openmp_runtimes() -> int:
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return 1
    paths = {line.split()[-1] for line in maps.splitlines() if ".so" in line}
    return sum(Path(path).name.startswith(("libgomp", "libiomp", "libomp")) for path in paths)
