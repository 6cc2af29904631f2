"""Run a command with a hard limit on its memory, page cache included, and say what it came to.

The limit is a memory cgroup's: version 1 in a group below the one that this process is in, version 2 through
``systemd-run --scope``. Where neither is permitted the command runs without, and that is said. Swap does not
count as memory: it is forbidden where the system lets it be. Files that were in the page cache before belong
to whoever read them first. Ends with the command's own exit code, 137 where the limit killed it.

    python benchmarks/limited.py 5GB .venv/bin/moesaic train arche-7b
"""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moesaic.files import human_size
from moesaic.offload.model import bytes_of

PAUSE = 0.1  # seconds between looks at a running command
JOIN = 'echo $$ > "$0" && exec "$@"'  # into the group before the command begins; its process id stays


@dataclass
class Seen:
    """What was seen of a process: its most resident memory, and the disk traffic that the kernel counts."""

    resident: int = 0
    read: int = 0
    written: int = 0

    def look(self, pid: int) -> None:
        """Take VmHWM and /proc/PID/io as they are now; nothing where the process has ended."""
        with suppress(OSError, ProcessLookupError):
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
            if match := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
                self.resident = max(self.resident, 1024 * int(match[1]))
            io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
            self.read, self.written = int(io["read_bytes"]), int(io["write_bytes"])


class Limit:
    """A hard limit of ``size`` bytes (None: no limit) on what ``start`` starts; ``with`` gives it back."""

    def __init__(self, size: int | None) -> None:
        self.size, self.group = size, None if size is None else _group_v1(size)
        self.scope = size is not None and self.group is None and _has_scopes()
        self.peak = self.anonymous = self.hits = self.kills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.group is not None and not self.scope:
            with suppress(OSError):
                self.group.rmdir()

    def start(self, words: list[str], **more: Any) -> "subprocess.Popen[str]":
        """Begin a command below the limit."""
        if self.scope:
            limits = [f"MemoryMax={self.size}", "MemorySwapMax=0"]
            words = ["systemd-run", "--scope", "--quiet", *(f"-p{limit}" for limit in limits), "--", *words]
        elif self.group is not None:
            words = ["sh", "-c", JOIN, str(self.group / "cgroup.procs"), *words]
        return subprocess.Popen(words, text=True, **more)

    def look(self, pid: int) -> None:
        """Take what the group says now: call it while the command runs, and once more at its end."""
        if self.scope:
            with suppress(OSError, StopIteration):
                own = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
                path = next(line[3:] for line in own if line.startswith("0::"))
                self.group = _mounts("cgroup2")[0] / path.lstrip("/")
        if self.group is None:
            return
        with suppress(OSError, ValueError):
            stat = _numbers(self.group / "memory.stat")
            self.anonymous = max(self.anonymous, stat.get("anon", stat.get("total_rss", 0)))
            if self.scope:
                self.peak = max(self.peak, int((self.group / "memory.current").read_text()))
                events = _numbers(self.group / "memory.events")
                self.hits, self.kills = events["max"], events["oom_kill"]
                self.peak = max(self.peak, int((self.group / "memory.peak").read_text()))
            else:
                self.peak = int((self.group / "memory.max_usage_in_bytes").read_text())
                counters = self.group.glob("memory.*failcnt")  # with swap it is the other one that counts
                self.hits = sum(int(path.read_text()) for path in counters)
                self.kills = _numbers(self.group / "memory.oom_control").get("oom_kill", 0)

    def verdict(self) -> str:
        """One line on what the command came to."""
        if self.size is None:
            return "none was asked for"
        if self.group is None:
            return (
                f"{human_size(self.size)} NOT ENFORCED: neither cgroup v1 nor systemd-run is permitted here"
            )
        end = f"{self.kills} processes KILLED by it" if self.kills else "held: nothing was killed"
        return (
            f"{human_size(self.size)} in cgroup v{2 if self.scope else 1}, {end}; "
            f"peak {human_size(self.peak)} with page cache, of which at most {human_size(self.anonymous)} "
            f"cannot be dropped (sampled); failcnt {self.hits}"
        )


def watch(child: "subprocess.Popen[str]", limit: Limit) -> Seen:
    """Wait for a command and look at it meanwhile."""
    seen = Seen()
    while child.poll() is None:
        seen.look(child.pid)
        limit.look(child.pid)
        time.sleep(PAUSE)
    limit.look(child.pid)
    return seen


def _group_v1(size: int) -> Path | None:
    """A new group below this process's own with that limit, or None where that is not permitted."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(path for _, kinds, path in (line.split(":", 2) for line in lines) if kinds == "memory")
        group = _mounts("cgroup", "memory")[0] / own.lstrip("/") / f"limited-{os.getpid()}-{time.time_ns()}"
        group.mkdir()
    except (OSError, StopIteration, IndexError):
        return None
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        with suppress(OSError):  # where the kernel counts no swap
            (group / "memory.memsw.limit_in_bytes").write_text(str(size))
    except OSError:
        group.rmdir()
        return None
    return group


def _has_scopes() -> bool:
    """Whether systemd-run may limit a command's memory in cgroup v2."""
    if shutil.which("systemd-run") is None or not _mounts("cgroup2"):
        return False
    words = ["systemd-run", "--scope", "--quiet", "-pMemoryMax=100M", "--", "true"]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _mounts(kind: str, option: str = "") -> list[Path]:
    """Where file systems of a kind are mounted."""
    rows = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(row[1]) for row in rows if row[2] == kind and (not option or option in row[3].split(","))]


def _numbers(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        size = bytes_of(sys.argv[1])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with Limit(size) as limit:
        child = limit.start(sys.argv[2:])
        seen = watch(child, limit)
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
        print(f"VmHWM (sampled): {human_size(seen.resident)}; exit code {code}", file=sys.stderr)
        print(f"limit: {limit.verdict()}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
