"""Evaluation tasks from local files, in the harness's own words: MMLU and GSM8K where no hub can be reached.

Prompts, answers and metrics are those of lm-evaluation-harness's ``mmlu`` and ``gsm8k``; only the rows come
from files: ``mmlu`` a folder with mmlu_dev.jsonl and mmlu_val.jsonl (``subject``, ``question``, ``choices``,
``answer``), or ``gsm8k`` a JSONL file (``question``, ``answer``), whose first rows are the examples that are
shown. ``contrast`` is of our own: which of two continuations is likelier."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from moesaic.data.readers import read_rows, text_of
from moesaic.errors import DataError, RecipeError

_MOST_LINE = 2**22
_SHOTS = 5
LOCAL = ("mmlu", "gsm8k", "contrast")
SHIPPED = "shipped"  # as a path: the file that comes along


def local_tasks(name: str, path: Path, limit: int | None, shots: int | None = None) -> list[dict[str, Any]]:
    """The task configurations of one local benchmark. ``limit`` questions at most (of MMLU in each subject).
    Raises DataError, RecipeError."""
    if name == "mmlu":
        return _mmlu(path, limit, shots)
    if name == "gsm8k":
        return [_gsm8k(path, limit, shots)]
    if name == "contrast":
        return _contrast(path, limit)
    raise RecipeError(f"--local {name}: {', '.join(LOCAL)} can be read from files")


def _contrast(file: Path, limit: int | None) -> list[dict[str, Any]]:
    """A task for each group of cases: a context, and which of two continuations is likelier, in all and for
    its length (chance 0.5). The cases that come along are 24 of each of five groups (docs/curriculum.md)."""
    if str(file) == SHIPPED:
        file = Path(str(resources.files("moesaic") / "data" / "contrast.jsonl"))
    groups: dict[str, list[dict[str, Any]]] = {}
    for where, row in read_rows(file, _MOST_LINE):
        texts = {name: text_of(row, name, where).strip() for name in ("group", "context", "good", "bad")}
        if not all(texts.values()):
            raise DataError(f"{where}: group, context, good and bad are texts, none of them empty")
        rows = groups.setdefault(texts["group"], [])
        right = len(rows) % 2  # in turns, so that a model without an opinion is right half of the time
        choices = [texts["bad"], texts["good"]] if right else [texts["good"], texts["bad"]]
        rows.append({"context": texts["context"], "choices": choices, "answer": right})
    metrics = [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ]
    return [
        {
            "task": f"contrast_{group}",
            "custom_dataset": partial(_dataset, {"test": rows[:limit]}),
            "test_split": "test",
            "num_fewshot": 0,
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": metrics,
            "metadata": None,
        }
        for group, rows in groups.items()
    ]


def _mmlu(folder: Path, limit: int | None, shots: int | None) -> list[dict[str, Any]]:
    shown = _by_subject(folder / "mmlu_dev.jsonl")
    asked = _by_subject(folder / "mmlu_val.jsonl")
    lacking = sorted(asked.keys() - shown.keys())
    if lacking:
        raise DataError(f"{folder / 'mmlu_dev.jsonl'}: has no example of {lacking[0]}")
    tasks = []
    for subject, rows in asked.items():
        if shots is not None and shots > len(shown[subject]):
            raise RecipeError(
                f"--shots {shots}: {folder / 'mmlu_dev.jsonl'} has {len(shown[subject])} of {subject}"
            )
        splits = {"dev": shown[subject], "validation": rows[:limit]}
        tasks.append(
            {
                "task": f"mmlu_{subject}",
                "custom_dataset": partial(_dataset, splits),
                "validation_split": "validation",
                "fewshot_split": "dev",
                "fewshot_config": {"sampler": "first_n"},
                "num_fewshot": min(_SHOTS, len(shown[subject])),
                "output_type": "multiple_choice",
                "description": "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n",
                "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
                "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
                "doc_to_choice": ["A", "B", "C", "D"],
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                "metadata": None,
            }
        )
    return tasks


def _gsm8k(file: Path, limit: int | None, shots: int | None) -> dict[str, Any]:
    rows = [_checked(row, where, ("question", "answer")) for where, row in read_rows(file, _MOST_LINE)]
    if shots is not None and shots > _SHOTS:
        raise RecipeError(f"--shots {shots}: of {file} {_SHOTS} rows are shown as examples")
    if len(rows) <= _SHOTS:
        raise DataError(
            f"{file}: has {len(rows)} rows; {_SHOTS} are shown as examples, and more must be asked"
        )
    splits = {"train": rows[:_SHOTS], "test": rows[_SHOTS:][:limit]}
    number = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
    return {
        "task": "gsm8k",
        "custom_dataset": partial(_dataset, splits),
        "training_split": "train",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "test_split": "test",
        "num_fewshot": _SHOTS,
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False, "temperature": 0.0
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
            }
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": number},
                    {"function": "take_first"},
                ],
            },
        ],
        "metadata": None,
    }  # fmt: skip


def _by_subject(file: Path) -> dict[str, list[dict[str, Any]]]:
    subjects: dict[str, list[dict[str, Any]]] = {}
    for where, row in read_rows(file, _MOST_LINE):
        kept = _checked(row, where, ("subject", "question", "choices", "answer"))
        choices, answer = row["choices"], row["answer"]
        four = isinstance(choices, list) and len(choices) == 4 and all(isinstance(c, str) for c in choices)
        if not four or type(answer) is not int or not 0 <= answer < 4:
            raise DataError(f"{where}: choices are four texts, and answer is the number of one, from 0")
        subjects.setdefault(str(row["subject"]), []).append(kept)
    return subjects


def _checked(row: dict[str, Any], where: str, fields: tuple[str, ...]) -> dict[str, Any]:
    """The fields that are needed, and no others. Raises DataError."""
    missing = [name for name in fields if name not in row]
    if missing:
        raise DataError(f"{where}: has no field {missing[0]!r}; needed are {', '.join(fields)}")
    if not isinstance(row["question"], str):
        raise DataError(f"{where}: question holds {type(row['question']).__name__}, not a text")
    return {name: row[name] for name in fields}


def _dataset(splits: dict[str, list[dict[str, Any]]], **_: Any) -> Any:
    """What the harness asks a task for; it passes what it knows of the model, which the rows do not need."""
    import datasets

    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
