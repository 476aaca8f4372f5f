"""Experiment trackers, through `accelerate.tracking`: which run they write into, and under which names.

accelerate and the trackers are imported only if `log.trackers` names one.
"""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.common.errors import UsageError
from moe_lm.config.run import LogConfig
from moe_lm.train.folder import name_of

GROUPS = {
    "optim": ("lr", "grad_norm"),
    "system": (
        "tokens_per_second",
        "seconds",
        "data_seconds",
        "reading_seconds",
        "memory_bytes",
        "host_bytes",
        "device_bytes",
        "mfu",
    ),
}  # all other figures of a step are of `train`
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
WORST: dict[str, Callable[[Sequence[float]], float]] = {
    "max_violation": max, "dead_share": max, "bias_range": max, "entropy": min, "router_entropy": min,
}  # fmt: skip


class Trackers:
    """The trackers of `config`, which go on in their runs of before after `start_step`.

    `settings` are the run's hyper-parameters by their paths. A tracker that fails during the run is left alone from
    then on, which `tell` says once. Raises UsageError if one is not installed or does not start.
    """

    def __init__(
        self,
        config: LogConfig,
        run_dir: Path,
        start_step: int,
        settings: Mapping[str, Any],
        tell: Callable[[str], object],
    ) -> None:
        self._tell: Callable[[str], object] = lambda text: None  # the error says enough until the run begins
        self._open: dict[str, Any] = {}
        self._owns_state = bool(config.trackers) and join_accelerate()
        for name in config.trackers:
            try:
                self._open[name] = started(Opening(name, config.project, run_dir, start_step), settings)
            except ImportError as error:
                self.close()
                raise UsageError(
                    f"log.trackers names {name}, which is not installed; pip install {name}, or leave it out"
                ) from error
            except Exception as error:  # no account, no network, a full disk: each tracker has its own errors
                self.close()
                raise UsageError(f"log.trackers: {name} did not start: {error}; fix that, or leave it out") from error
        self._tell = tell

    def log(self, step: int, figures: Mapping[str, Any]) -> None:
        """Send the figures of a record of `metrics.jsonl`, under the names that `grouped` gives them."""
        values = dict(grouped(figures)) if self._open else {}
        if values:
            self._each(lambda name, tracker: send(name, tracker, step, values))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Send a text to the trackers that show texts."""
        self._each(lambda name, tracker: send_text(name, tracker, step, prompt, text))

    def close(self) -> None:
        self._each(lambda name, tracker: tracker.finish())
        if self._owns_state:
            from accelerate.state import PartialState

            PartialState._reset_state()

    def _each(self, action: Callable[[str, Any], object]) -> None:
        """Training survives an unreachable tracker."""
        for name, tracker in list(self._open.items()):
            try:
                action(name, tracker)
            except Exception as error:
                del self._open[name]
                self._tell(f"warning: {name} could not be written: {error}; training goes on")


class Opening(NamedTuple):
    """The run of a tracker that begins or goes on."""

    tracker: str
    project: str
    run_dir: Path
    start_step: int

    @property
    def name(self) -> str:
        return name_of(self.run_dir)

    @property
    def folder(self) -> Path:
        """Where a tracker writes that needs no server."""
        return self.run_dir / self.tracker

    @property
    def note(self) -> Path:
        """Keeps what the tracker finds its run by."""
        return self.run_dir / f"{self.tracker}-id"

    @property
    def known(self) -> str | None:
        """What the run to go on in is found by; None for one that begins."""
        return self.note.read_text(encoding="utf-8").strip() if self.start_step and self.note.is_file() else None

    def own_id(self, digits: int) -> str:
        """The id to go on with, or a new one of so many hexadecimal digits."""
        return self.known or uuid.uuid4().hex[:digits]


class Kind(NamedTuple):
    """How a tracker of accelerate's begins a run, and finds it again."""

    options: Callable[[Opening], dict[str, Any]]  # of the program's own start, beside the project
    id_of: Callable[[Any], object] | None = None  # what to find the run by; None: its folder or its name
    prepare: Callable[[Any, Opening], object] = lambda run, at: None
    title: Callable[[Opening], str] = lambda at: at.project  # the first argument of accelerate's class


# wandb: by its own step counter the server would refuse the steps that a killed process has already sent.
# clearml: it would add the steps of before to ours.
KINDS = {
    "tensorboard": Kind(
        lambda at: {"logging_dir": at.run_dir, "purge_step": at.start_step + 1}, title=lambda at: at.folder.name
    ),
    "wandb": Kind(
        lambda at: {"name": at.name, "id": at.own_id(12), "resume": "allow", "dir": str(at.run_dir)},
        lambda run: run.id,
        lambda run, at: run.define_metric("*", step_metric="step"),
    ),
    "trackio": Kind(  # gives a run another name if that is taken
        lambda at: {"name": at.known or at.name, "resume": "allow" if at.start_step else "never"}, lambda run: run.name
    ),
    "comet_ml": Kind(
        lambda at: {"experiment_key": at.own_id(32), "mode": "get_or_create"},
        lambda run: run.get_key(),
        lambda run, at: run.set_name(at.name),
    ),
    "mlflow": Kind(lambda at: {"run_id": at.known, "run_name": at.name}, lambda run: run.info.run_id),
    "aim": Kind(
        lambda at: {"logging_dir": str(at.run_dir), "run_hash": at.known, "experiment": at.project},
        lambda run: run.hash,
        title=lambda at: at.name,
    ),
    "clearml": Kind(
        lambda at: {
            "project_name": at.project, "task_name": at.name, "reuse_last_task_id": False,
            "continue_last_task": at.known or False,
        },
        lambda run: run.id,
        lambda run, at: run.set_initial_iteration(0),
    ),
    "swanlab": Kind(
        lambda at: {
            "experiment_name": at.name, "id": at.own_id(21), "resume": "allow", "logdir": str(at.folder),
        },
        lambda run: run.id,
    ),
    "dvclive": Kind(lambda at: {"dir": str(at.folder), "resume": at.start_step > 0}),
}  # fmt: skip


def started(at: Opening, settings: Mapping[str, Any]) -> Any:
    """The tracker of accelerate's, in its run of before if it has one; a run that begins gets the settings."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind, begins = KINDS[at.tracker], at.known is None
    tracker = LOGGER_TYPE_TO_CLASS[at.tracker](kind.title(at), **kind.options(at))
    tracker.start()
    kind.prepare(tracker.tracker, at)
    if begins:
        tracker.store_init_configuration({name: plain(value) for name, value in settings.items()})
        at.note.write_text(str(kind.id_of(tracker.tracker) if kind.id_of else at.name), encoding="utf-8")
    return tracker


def send(name: str, tracker: Any, step: int, values: Mapping[str, float]) -> None:
    if name == "wandb":
        tracker.log({**values, "step": step})
    else:
        tracker.log(values, step=step)


def send_text(name: str, tracker: Any, step: int, prompt: str, text: str) -> None:
    """To the trackers that show texts beside the figures."""
    if name == "tensorboard":
        tracker.log({f"sample/{prompt}": text}, step=step)
    elif name == "wandb":
        tracker.log_table("sample", columns=["step", "prompt", "text"], data=[[step, prompt, text]])
    elif name == "swanlab":
        tracker.log({"sample": importlib.import_module("swanlab").Text(text, caption=prompt)}, step=step)


def plain(value: Any) -> str | float | bool:
    """A setting as every tracker takes it: numbers as they are, all else as text."""
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value)


def grouped(figures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a record as people look for them: `train/loss`, `val/loss`, `optim/lr`, `system/seconds`.

    Of the experts, the mean over the layers and the worst of them: `balance/max_violation_mean`, `..._max`.
    """
    for name, value in figures.items():
        if name == "experts":
            yield from balance(value)
        elif name not in ("step", "time"):
            group = "val" if name.startswith("val_") else GROUP_OF.get(name, "train")
            yield from numbers(value, "tasks" if name == "tasks" else f"{group}/{name.removeprefix('val_')}")


def balance(layers: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for name, worst in WORST.items():
        values = [float(layer[name]) for layer in layers if name in layer]
        if values:
            yield f"balance/{name}_mean", sum(values) / len(values)
            yield f"balance/{name}_{worst.__name__}", worst(values)


def numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Every number in a value, with its path after `name`."""
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from numbers(item, f"{name}/{key}")


def join_accelerate() -> bool:
    """Give accelerate the state without which its trackers refuse to log; whether it had none.

    The process group has met by now, so nothing is exchanged here.
    """
    from accelerate.state import PartialState

    if PartialState._shared_state:
        return False
    PartialState()
    return True
