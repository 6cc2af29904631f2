"""lm-evaluation-harness with our model in process: ``moesaic eval MODEL --tasks …``."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.analysis.answers import greedy_answers
from moesaic.analysis.scoring import Pair, score
from moesaic.analysis.tasks import local_tasks
from moesaic.errors import DataError, RecipeError
from moesaic.lm import LM

Say = Callable[[str], None]
Results = dict[str, dict[str, float]]  # task -> metric -> value
_QUIET_FOR = {"mininterval": 10.0, "delay": 10.0}  # seconds: a short task needs no bar
_MOST_NEW = 256  # tokens of an answer, where a task does not say


@dataclass(frozen=True)
class Suite:
    """What to ask a model. ``tasks`` are the harness's own, whose data comes from the hub; ``local`` are read
    from files (tasks.py). ``shots`` examples are shown, as many as a task says where None; ``limit``
    questions at most are asked of each."""

    tasks: Sequence[str] = ()
    local: Mapping[str, Path] = field(default_factory=dict)
    shots: int | None = None
    limit: int | None = None

    def check(self) -> None:
        """Raises RecipeError for a task that is not known, DataError for files that cannot be read."""
        _lm_eval()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        manager = TaskManager() if self.tasks else None
        unknown = [name for name in self.tasks if manager and not manager.match_tasks([name])]
        if unknown:
            raise RecipeError(
                f"tasks: {unknown[0]} is no task of lm-evaluation-harness; `lm-eval ls tasks` lists them"
            )
        for name, path in self.local.items():
            local_tasks(name, path, self.limit, self.shots)

    def run(self, lm: LM, say: Say) -> Results:
        """For every task its metrics and their standard errors by name. Raises as ``check``, and DataError
        where data cannot be fetched."""
        lm_eval = _lm_eval()
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wanted: list[Any] = list(self.tasks)
        for name, path in self.local.items():  # the harness changes what it is given
            wanted += local_tasks(name, path, self.limit, self.shots)
        try:
            found = lm_eval.simple_evaluate(
                model=harness_model(lm, say),
                tasks=wanted,
                num_fewshot=self.shots,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=TaskManager(),
            )
        except (ConnectionError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(
                f"the tasks' data cannot be fetched ({reason}); local tasks are read from files"
            ) from None
        return _metrics(found["results"], found.get("n-samples", {}))


def harness_model(lm: LM, say: Say) -> Any:
    """The model as the harness wants one: log-likelihoods from shared prefixes, rolling ones, greedy
    answers."""
    _lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm

    class Moesaic(TemplateLM):  # type: ignore[misc]
        """What the harness asks of a model."""

        @property
        def eot_token_id(self) -> int:
            ends = [lm.tokenizer.eos_id] if lm.tokenizer.eos_id is not None else sorted(lm.stop_ids)
            return int(ends[0]) if ends else 0

        @property
        def max_length(self) -> int:
            return lm.config.context

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids: list[int] = lm.tokenizer.encode(string, special=bool(add_special_tokens)).tolist()
            return ids

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            pairs: list[Pair] = [(context, rest) for _, context, rest in requests]
            with tqdm(total=len(pairs), desc="log-likelihoods", **_QUIET_FOR) as bar:
                found = score(lm.model, pairs, self.max_length, bar.update)
            return [(one.logprob, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                pairs: list[Pair] = [make_disjoint_window(window) for window in windows]
                totals.append(sum(one.logprob for one in score(lm.model, pairs, self.max_length)))
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            answers = ["" for _ in requests]
            alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}  # those that end by the same rule
            for number, request in enumerate(requests):
                options = request.args[1]
                until = options.get("until") or []
                most = min(int(options.get("max_gen_toks", _MOST_NEW)), self.max_length // 2)
                stop = (until,) if isinstance(until, str) else tuple(until)
                alike.setdefault((most, stop), []).append(number)
            for (most, stop), numbers in alike.items():
                asked = [self.tok_encode(requests[n].args[0]) for n in numbers]
                prompts = [prompt or [self.eot_token_id] for prompt in asked]
                with tqdm(total=len(prompts), desc="answers", **_QUIET_FOR) as bar:
                    found = greedy_answers(lm, prompts, self.max_length, most, stop, bar.update)
                for n, answer in zip(numbers, found, strict=True):
                    answers[n] = answer
            return answers

    if lm.config.context <= _MOST_NEW:
        say(f"the model reads {lm.config.context} tokens; longer prompts lose their beginning")
    return Moesaic()


def rows_of(results: Mapping[str, Results]) -> list[tuple[str, list[str]]]:
    """A row for every task and metric, a column for every model; MMLU's subjects also as their mean."""
    names = list(dict.fromkeys(task for found in results.values() for task in found))
    rows = []
    for task in names:
        metrics = dict.fromkeys(
            m for found in results.values() for m in found.get(task, {}) if "stderr" not in m
        )
        for metric in metrics:
            if metric in ("samples", "tokens"):
                continue
            cells = []
            for found in results.values():
                value, error = found.get(task, {}).get(metric), found.get(task, {}).get(f"{metric} stderr")
                shown = "" if value is None else f"{value:.4f}"
                cells.append(shown if error is None else f"{shown} ± {error:.4f}")
            rows.append((f"{task}: {metric}", cells))
    return rows


def _metrics(found: dict[str, Any], counts: dict[str, Any]) -> Results:
    """The harness's ``acc,none`` and ``acc_stderr,none`` as plain names; parts of a task also together."""
    tasks: dict[str, dict[str, float]] = {}
    for task, values in found.items():
        kept: dict[str, float] = {}
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, int | float) or name == "sample_len":
                continue
            label = name.removesuffix("_stderr") + ("" if filtered in ("none", "") else f" ({filtered})")
            kept[f"{label} stderr" if name.endswith("_stderr") else label] = float(value)
        size = counts.get(task, {}).get("effective")
        tasks[task] = {**kept, **({"samples": float(size)} if size else {})}
    for whole in ("mmlu", "contrast"):
        _add_mean(tasks, whole)
    return tasks


def _add_mean(tasks: Results, whole: str) -> None:
    """MMLU's subjects together as ``mmlu``, a contrast's groups as ``contrast``, each question weighing the
    same."""
    parts = [v for task, v in tasks.items() if task.startswith(f"{whole}_") and "samples" in v]
    if len(parts) < 2 or whole in tasks:
        return
    total = sum(values["samples"] for values in parts)
    shared = [metric for metric in ("acc", "acc_norm") if all(metric in values for values in parts)]
    tasks[whole] = {m: sum(v[m] * v["samples"] for v in parts) / total for m in shared}
    for metric in shared:  # of a share of so many answers
        share = tasks[whole][metric]
        tasks[whole][f"{metric} stderr"] = (share * (1 - share) / max(1, total - 1)) ** 0.5
    tasks[whole]["samples"] = total


def _lm_eval() -> Any:
    try:
        import lm_eval
    except ImportError:
        raise RecipeError("evaluation by tasks needs lm_eval: pip install 'moesaic[eval]'") from None
    return lm_eval
