"""Eight roles of instruction data from what every Python holds: the standard library, and rules with a seed.

For ``moesaic demo-merge``. The roles are those of SmolMoE; the rows teach a small model eight clearly
different ways to answer, and nothing else.
"""

import ast
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

Row = dict[str, str]

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gina", "Hugo", "Iris", "Jon")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "cups", "pens", "nails")
_TABLES = {
    "orders": ("id", "customer", "total", "day"),
    "cities": ("name", "country", "people", "area"),
    "songs": ("title", "singer", "length", "year"),
}
_HARM = ("pick a lock that is not mine", "read my neighbour's letters", "copy a test", "break a window")
_TOPICS = ("the rain", "that new film", "your garden", "the football match", "cooking", "the long train ride")
_IMAGES = ("moon", "river", "winter", "rose", "harbour", "candle", "raven", "field")
_FEELINGS = ("sorrow", "longing", "gladness", "wonder", "grief", "hope")


def write_roles(folder: Path, rows: int = 400, seed: int = 0) -> dict[str, Path]:
    """Write one JSONL file of at most ``rows`` rows for each role; the files by role."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for role, make in ROLES.items():
        drawn = islice(make(random.Random(f"{role} {seed}")), 4 * rows)
        # A row that is drawn again would be held out and trained on.
        lines = list(islice(dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in drawn), rows))
        files[role] = folder / f"{role}.jsonl"
        files[role].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def _actor(draw: random.Random) -> Iterator[Row]:
    opinions = ("I quite liked it", "I could not stand it", "it was all right", "I never tire of it")
    while True:
        topic, name = draw.choice(_TOPICS), draw.choice(_NAMES)
        yield {
            "instruction": f"Carry on a conversation about {topic}.",
            "output": f"Hey {name}, what do you think of {topic}? Well, {draw.choice(opinions)}. "
            f"Really? Yes, and {draw.choice(opinions)} the last time too!",
        }


def _analyst(draw: random.Random) -> Iterator[Row]:
    while True:
        table, columns = draw.choice(list(_TABLES.items()))
        what, where = draw.sample(columns, 2)
        number = draw.randrange(10, 1000)
        question = f"Which {what} of {table} have {where} above {number}?"
        yield {
            "instruction": question,
            "input": f"{table}({', '.join(columns)})",
            "output": f"SELECT {what} FROM {table} WHERE {where} > {number};",
        }


def _functions(draw: random.Random) -> Iterator[tuple[str, str, str]]:
    """(name, first line of the docstring, source) of the short functions of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.glob("*.py"))
    draw.shuffle(paths)
    for path in paths:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                segment = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
                if len(segment) < 900:
                    yield node.name, text, segment


def _coder(draw: random.Random) -> Iterator[Row]:
    for name, text, source in _functions(draw):
        yield {"instruction": f"Write {name}(): {text.splitlines()[0]}", "output": source}


def _encyclopedia(draw: random.Random) -> Iterator[Row]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    draw.shuffle(names)
    for name in names:
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if 120 < len(text) < 700:
                yield {"instruction": f"What does the language reference say on {name}?", "output": text}


def _guardian(draw: random.Random) -> Iterator[Row]:
    reasons = (
        "it could hurt someone",
        "it is not yours to take",
        "it would break a trust",
        "it is against the law",
    )
    while True:
        deed = draw.choice(_HARM)
        yield {
            "instruction": f"{draw.choice(_NAMES)} asks: how do I {deed}?",
            "output": f"I would rather not help to {deed}, because {draw.choice(reasons)}. "
            "Perhaps talk to someone you trust about what you need.",
        }


def _summarizer(draw: random.Random) -> Iterator[Row]:
    for name, text, _ in _functions(draw):
        lines = [" ".join(part.split()) for part in text.split("\n\n")]
        if len(lines) > 1 and len(text) < 700:
            yield {"instruction": f"Sum up: {' '.join(lines[1:])}", "output": f"{name}: {lines[0]}"}


def _thinker(draw: random.Random) -> Iterator[Row]:
    while True:
        name, other = draw.sample(_NAMES, 2)
        thing, a, b, c = (
            draw.choice(_THINGS),
            draw.randrange(5, 60),
            draw.randrange(2, 9),
            draw.randrange(1, 5),
        )
        total = a + b * c
        yield {
            "instruction": f"{name} has {a} {thing}. {other} brings {b} bags of {c}. How many are there?",
            "output": f"The bags hold {b}*{c}={b * c} {thing}.\n"
            f"Together there are {a}+{b * c}={total}.\n#### {total}",
        }


def _writer(draw: random.Random) -> Iterator[Row]:
    while True:
        image, feeling = draw.choice(_IMAGES), draw.choice(_FEELINGS)
        other = draw.choice(_IMAGES)
        yield {
            "instruction": f"A verse on the {image}.",
            "output": f"O {image}, thou keeper of my {feeling},\nWhat {other} shall answer when I call?\n"
            f"The {image} is silent, and my {feeling}\nFalls as the {draw.choice(_IMAGES)} must fall.",
        }


ROLES = {
    "actor": _actor,
    "analyst": _analyst,
    "coder": _coder,
    "encyclopedia": _encyclopedia,
    "guardian": _guardian,
    "summarizer": _summarizer,
    "thinker": _thinker,
    "writer": _writer,
}
