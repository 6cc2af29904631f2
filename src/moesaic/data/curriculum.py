"""Structured patterns to learn from before text: what is seen, what was believed, how that changes, what
follows.

A pattern has six parts: observe, prior, update, ripple, analogy, act. Each gives four tasks, in each of which
one of the last four parts is to be produced from all before it; only that part is learnt, neither tags nor
what is given. 308 patterns of 14 domains come along (docs/curriculum.md); a file of one's own has the same
keys."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moesaic.data.readers import read_rows, text_of
from moesaic.errors import DataError

DOMAINS = (
    *("systems", "mathematics", "physics", "biology", "information", "cognition", "energy"),
    *("scale", "complexity", "time", "economics", "social", "language", "philosophy"),
)
PARTS = ("observe", "prior", "update", "ripple", "analogy", "act")
TARGETS = PARTS[2:]
_MOST_LINE = 2**20


@dataclass(frozen=True)
class Pattern:
    """One chain of six texts about a fact of a domain, and where it stands."""

    domain: str
    title: str
    parts: dict[str, str]
    where: str

    def tasks(self) -> Iterator[tuple[str, str]]:
        """What is given, tags and all, and what is to be produced; one for each target."""
        for number, target in enumerate(TARGETS, 2):
            given = "".join(f"{part.upper()}: {self.parts[part]}\n" for part in PARTS[:number])
            yield f"{given}{target.upper()}:", f" {self.parts[target]}"


def builtin_patterns() -> Path:
    """The file that comes along."""
    return Path(str(resources.files("moesaic") / "data" / "patterns.jsonl"))


def read_patterns(path: Path) -> list[Pattern]:
    """All patterns of a file. Raises DataError naming file and line for a part that is missing or empty, and
    for a title that comes twice."""
    found: list[Pattern] = []
    for where, row in read_rows(path, _MOST_LINE):
        texts = {name: text_of(row, name, where) for name in ("domain", "title", *PARTS) if name in row}
        for name in ("domain", "title", *PARTS):
            if not texts.get(name, "").strip():
                raise DataError(f"{where}: has no {name!r}; a pattern has domain, title, {', '.join(PARTS)}")
        parts = {name: " ".join(texts[name].split()) for name in PARTS}
        found.append(Pattern(texts["domain"].strip(), texts["title"].strip(), parts, where))
    twice = [title for title, count in Counter(p.title for p in found).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the title {twice[0]!r} comes twice; give each pattern its own")
    return found


def by_domain(patterns: list[Pattern]) -> dict[str, list[Pattern]]:
    """Patterns by domain: the fourteen in their order first, then any others as they come."""
    names = list(dict.fromkeys([*DOMAINS, *(pattern.domain for pattern in patterns)]))
    grouped: dict[str, list[Pattern]] = {name: [] for name in names}
    for pattern in patterns:
        grouped[pattern.domain].append(pattern)
    return {name: found for name, found in grouped.items() if found}
