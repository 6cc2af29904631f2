"""What ``moesaic demo-pipeline`` fine-tunes, prefers and asks, made of the rows of roles.py.

A pair prefers the right answer to that of another question of the same role; a question of the benchmark has
four answers of one role, of which one is right.
"""

import json
import random
from pathlib import Path
from typing import Any

from moesaic.data.instructions import read_examples, split_key, which_held_out

Row = dict[str, Any]

HELD_OUT = 0.1  # as data.val_fraction is by itself

_CLOSINGS = ("I hope that helps!", "Ask me again whenever you like.", "Glad to help!")


def write_pairs(roles: dict[str, Path], out: Path, each: int, seed: int) -> Path:
    """At most ``each`` pairs of every role, as rows of prompt, chosen and rejected."""
    draw, lines = random.Random(seed), []
    for file in roles.values():
        rows = _rows(file)
        draw.shuffle(rows)
        for row in rows[:each]:
            polite = f"{row['output']}\n{draw.choice(_CLOSINGS)}"
            pair = {"prompt": _asked(row), "chosen": polite, "rejected": row["output"]}
            lines.append(json.dumps(pair, ensure_ascii=False))
    draw.shuffle(lines)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def write_questions(roles: dict[str, Path], folder: Path, each: int, seed: int) -> Path:
    """mmlu_dev.jsonl and mmlu_val.jsonl with at most ``each`` questions of every role, four answers each;
    asked is what instruction data holds out, shown as examples what it trains on."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[str]] = {"dev": [], "val": []}
    for role, file in roles.items():
        rows = _rows(file)
        out = which_held_out([split_key(example) for example in read_examples(file, role)], HELD_OUT)
        apart = [
            [row for row, held in zip(rows, out, strict=True) if held == wanted] for wanted in (False, True)
        ]
        for part in apart:
            draw.shuffle(part)
        others = sorted({row["output"] for row in rows})
        for n, row in enumerate([*apart[0][:5], *apart[1][:each]]):
            wrong = draw.sample([text for text in others if text != row["output"]], 3)
            answer = draw.randrange(4)
            choices = [*wrong[:answer], row["output"], *wrong[answer:]]
            asked = {"subject": role, "question": _asked(row), "choices": choices, "answer": answer}
            parts["dev" if n < 5 else "val"].append(json.dumps(asked, ensure_ascii=False))
    for name, lines in parts.items():
        (folder / f"mmlu_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _asked(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])
