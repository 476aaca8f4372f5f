"""Evaluation on tasks with lm-eval, whose own tasks need a download, and with those of `eval/tasks`, which do not."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_lm.common import hub
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import check_writable
from moe_lm.common.process import how_to_install
from moe_lm.evaluate.perplexity import precision_of
from moe_lm.evaluate.scoring import Scorer, SessionScorer, Tell
from moe_lm.generate.session import Session

if TYPE_CHECKING:
    from moe_lm.config.generation import TasksConfig

LOCAL_TASKS = Path(__file__).parents[2] / "eval" / "tasks"
TASK_DATA = "MOE_LM_TASK_DATA"  # the folder that they read, in the environment
BOOTSTRAPS = 1000  # of metrics without a formula for their standard error, such as perplexity
FEWSHOT_SEED = 1234  # lm-eval's


@dataclass(frozen=True)
class TaskResult:
    """A task's metrics with their standard errors, or those of a group of tasks."""

    name: str
    metrics: Mapping[str, tuple[float, float | None]]
    examples: int
    shots: int | None = None

    def __str__(self) -> str:
        """`acc 0.7012 ± 0.0101`, every metric so."""
        shown = [
            f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}")
            for name, (value, error) in self.metrics.items()
        ]
        return " ".join(shown)

    def figures(self) -> dict[str, Any]:
        """The metrics by name; `stderr` is of the first one."""
        found: dict[str, Any] = {}
        for number, (name, (value, error)) in enumerate(self.metrics.items()):
            found[name] = value
            found[f"{name}_stderr" if number else "stderr"] = error
        return {**found, "n": self.examples}


class Tasks:
    """Tasks with their data. Raises UsageError for one that is unknown, or whose data cannot be had."""

    def __init__(self, names: Sequence[str], data: Path | None = None, num_fewshot: int | None = None) -> None:
        with _quiet(), _reading(data):
            try:
                from lm_eval.tasks import TaskManager
            except ImportError as error:
                raise MoeLmError(f"tasks need lm-eval, which is not installed; {how_to_install('eval')}") from error
            # lm-eval's index takes many seconds to read.
            manager = TaskManager(include_path=str(LOCAL_TASKS), include_defaults=False)
            ours = set(manager.all_tasks)
            if any(name not in ours for name in names):
                manager = TaskManager(include_path=str(LOCAL_TASKS))
            _check_names(names, manager.all_tasks)
            if any(name not in ours for name in names) and not hub.is_reachable():
                _stay_offline()
            self._loaded = _load(manager, list(names))
        for task in self._loaded["tasks"].values():
            default = task.get_config("num_fewshot")
            if default is None or (num_fewshot is not None and default != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    @property
    def writing(self) -> list[str]:
        """The names of the tasks for which the model writes, where others have it score."""
        tasks = self._loaded["tasks"].items()
        return [name for name, task in tasks if task.get_config("output_type") == "generate_until"]

    def run(
        self, scorer: Scorer, limit: float | None = None, chat: bool = False, samples: list[Any] | None = None
    ) -> list[TaskResult]:
        """The results of all tasks, on their first `limit` examples; below 1 it is a share of them.

        `chat` puts every prompt into the chat template. Every example goes to the end of `samples`, as lm-eval logs it.
        """
        from lm_eval.evaluator import evaluate

        from moe_lm.evaluate.harness import HarnessModel

        with _quiet() as aloud:
            found = evaluate(
                HarnessModel(scorer, aloud), self._loaded, limit=limit, apply_chat_template=chat,
                fewshot_as_multiturn=chat, bootstrap_iters=BOOTSTRAPS, log_samples=samples is not None,
            )  # fmt: skip
        if samples is not None:
            samples += [{"task": name, **line} for name, lines in found["samples"].items() for line in lines]
        return [_result(name, found) for name in found["results"]]


def evaluate_tasks(
    run: Path, config: TasksConfig, base: Path | None = None, tell: Tell = lambda done, total: None
) -> list[TaskResult]:
    """Evaluate a run, or a checkpoint, on the tasks of `config`. Writes `config.output` if it is set.

    The precision is that of training. Raises UsageError, before the model is loaded, for tasks that cannot be had.
    """
    if config.output is not None:
        check_writable(config.output, "--output")
    tasks = Tasks(config.tasks, config.task_data, config.num_fewshot)
    session = Session.load(run, base=base, decoding=bool(tasks.writing))
    if config.apply_chat_template and not session.tokenizer.has_chat_template:
        raise UsageError(f"--apply-chat-template: the tokenizer of {run} has no chat template; leave it out")
    scorer = SessionScorer(session, config.batch_size, precision_of(session), tell)
    samples: list[Any] | None = None if config.output is None else []
    results = tasks.run(scorer, config.limit, config.apply_chat_template, samples)
    if config.output is not None:
        about = {"model": str(session.checkpoint), "limit": config.limit, "chat_template": config.apply_chat_template}
        tables = {result.name: {**result.figures(), "num_fewshot": result.shots} for result in results}
        write_json(config.output, {**about, "results": tables, "samples": samples})
    return results


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Raises MoeLmError when the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    except OSError as error:
        raise MoeLmError(f"cannot write {file}: {error.strerror}; name another --output") from error


def table(results: Sequence[TaskResult]) -> str:
    """A line for each metric: its value, standard error and number of examples."""
    rows = [("task", "metric", "value", "stderr", "examples")]
    for result in results:
        for name, (value, error) in result.metrics.items():
            shown = "" if error is None else f"{error:.4f}"
            rows.append((result.name, name, f"{value:.4f}", shown, f"{result.examples:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust)
    lines = (
        "  ".join(pad(cell, width) for pad, cell, width in zip(left, row, widths, strict=True)).rstrip() for row in rows
    )
    return "\n".join(lines)


def _check_names(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            offline = ", ".join(sorted(task for task in known if task.endswith("_offline")))
            hint = f"{offline} read files of --task-data, and `lm-eval ls tasks` lists lm-eval's"
            hint = f"did you mean {' or '.join(near)}?" if near else hint
            raise UsageError(f"there is no task {name}; {hint}")


def _stay_offline() -> None:
    """Have data sets come from the cache alone: their retries without a network take more than a minute."""
    import datasets
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_OFFLINE = True


@contextlib.contextmanager
def _reading(data: Path | None) -> Iterator[None]:
    """Have the tasks that are loaded meanwhile read this folder, if it is given."""
    before = os.environ.get(TASK_DATA)
    if data is not None:
        os.environ[TASK_DATA] = str(data)
    try:
        yield
    finally:
        os.environ.pop(TASK_DATA, None)
        if before is not None:
            os.environ[TASK_DATA] = before


def _load(manager: Any, names: list[str]) -> Any:
    """Load tasks with their data; a data set that cannot be had is one sentence."""
    try:
        return manager.load(names)
    except UsageError:
        raise
    except Exception as error:  # each kind of data set and each state of the network has its own
        local = [f"{name}_offline" for name in names if f"{name}_offline" in manager.all_tasks]
        instead = f", or use {', '.join(local)}, which reads files of --task-data" if local else ""
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UsageError(
            f"the data of {', '.join(names)} is neither here nor to be downloaded ({reason}); load it once where there "
            f"is a network{instead}"
        ) from error


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    """The metrics of one task of lm-eval's results, where they are named `acc,none` and `acc_stderr,none`."""
    values = found["results"][name]
    metrics = {}
    for key, value in sorted(values.items()):
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered == "none" else f"{metric} ({filtered})"
        metrics[label] = (float(value), float(error) if isinstance(error, int | float) else None)
    counts = found["n-samples"]
    members = [name] if name in counts else _members(name, found.get("group_subtasks", {}))
    examples = sum(counts[member]["effective"] for member in members if member in counts)
    return TaskResult(name, metrics, examples, found["n-shot"].get(name))


def _members(group: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks of a group and of the groups in it."""
    return [task for child in groups.get(group, ()) for task in ([child, *_members(child, groups)])]


@contextlib.contextmanager
def _quiet() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Keep lm-eval's bars and remarks off the terminal, and its bootstraps in this process.

    Yields a context in which the terminal is there.
    """
    out, err = sys.stdout, sys.stderr

    @contextlib.contextmanager
    def aloud() -> Iterator[None]:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            yield

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield aloud
    finally:
        logger.setLevel(level)
