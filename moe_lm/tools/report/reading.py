"""A run as a page shows it: its records streamed once, thinned, and judged by the table of symptoms."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.process import to_type
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig
from moe_lm.tools.report.thinning import Row, Spans, Spread
from moe_lm.train.alarms import Alarms
from moe_lm.train.folder import name_of
from moe_lm.train.past import Plan
from moe_lm.train.settings import flat_settings

COLUMNS = (
    "step", "tokens", "hours", "loss", "grad_norm", "lr", "tokens_per_second", "seconds", "data_seconds", "between",
)  # fmt: skip
HELD_OUT = ("step", "tokens", "hours", "val_loss")
POINTS = 120  # of a line, at least, of a long run
CELLS = 400_000  # of all heat maps of a run
COLUMNS_OF_HEAT = 60  # at least, unless that are more cells
EVENTS, SAMPLES, TASKS = 100, 4, 50  # kept of a kind, of a prompt, and of evaluations, at least


@dataclass
class Finding:
    """A symptom that a run showed."""

    name: str
    cure: str
    first: int  # steps
    last: int
    said: str  # the newest

    def also(self, step: int, said: str) -> None:
        self.first = min(self.first, step)
        if step >= self.last:
            self.last, self.said = step, said


@dataclass
class Run:
    """What a page says of one run."""

    folder: Path
    name: str
    settings: dict[str, Any]  # by their paths
    config: RunConfig | None
    steps: Spans = field(default_factory=lambda: Spans(POINTS))
    held_out: Spans = field(default_factory=lambda: Spans(POINTS))
    by_source: dict[str, float] = field(default_factory=dict)  # the newest held-out loss
    best: tuple[int, float] | None = None  # step and held-out loss
    held_out_loss: float = math.nan  # the newest
    load: Spans | None = None  # rows: step, then the experts of each layer
    load_shape: tuple[int, int] = (0, 0)  # MoE layers, experts
    model: ModelConfig | None = None
    events: dict[str, Spread] = field(default_factory=dict)
    samples: dict[str, Spread] = field(default_factory=dict)
    tasks: Spread = field(default_factory=lambda: Spread(TASKS))
    findings: dict[str, Finding] = field(default_factory=dict)
    unjudged: str = ""  # why the symptoms could not be looked for
    step: int = 0
    tokens: float = 0
    hours: float = 0
    skipped: int = 0
    last_time: float | None = None

    @property
    def total_steps(self) -> int | None:
        return None if self.config is None else self.config.train.steps


def read_run(folder: Path) -> Run:
    """Read a run folder, or that of a checkpoint. Raises UsageError without a `metrics.jsonl`."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file() and checkpoint.STEP_NAME.fullmatch(folder.absolute().name):
        return read_run(Path(os.path.normpath(folder / ".." / "..")))
    if not metrics.is_file() and any(folder.glob("checkpoints/step-*")):
        raise UsageError(
            f"{folder} was imported, upcycled or merged, and no training of it is recorded; measure it with "
            + to_type("eval", folder)
        )
    if not metrics.is_file():
        raise UsageError(
            f"{folder} holds no metrics.jsonl; expected the folder of a run that has begun, like runs/mine"
        )
    config, values = read_config(folder)
    run = Run(folder, name_of(folder), dict(flat_settings(values)), config)
    try:
        with metrics.open("rb") as file:
            Reader(run).read(lines(file))
    except OSError as error:
        raise MoeLmError(f"cannot read {metrics}: {error.strerror}") from error
    if not len(run.steps):
        raise UsageError(f"{metrics} has no step yet; expected a run that has trained at least one")
    return run


def read_config(folder: Path) -> tuple[RunConfig | None, dict[str, Any]]:
    """The config of a run, and its values; no config if this version does not understand them."""
    path = folder / "config.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None, {}
    if not isinstance(values, dict):
        return None, {}
    try:
        if "model" in values:
            return build_config(PretrainConfig, values, str(path)), values
        return build_config(FinetuneConfig, values, str(path)), values  # its model comes with its start
    except MoeLmError:
        return None, values


def lines(file: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines of a `metrics.jsonl` that are whole and of a step."""
    for line in file:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            yield found


class Reader:
    """Goes through the lines of a run once."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._alarms: Alarms | None = None
        self._time: float | None = None  # of the record before, unless the run was started since

    def read(self, found: Iterable[Mapping[str, Any]]) -> None:
        for line in found:
            if "event" in line:
                self._event(line)
            else:
                self._record(line)

    def _record(self, record: Mapping[str, Any]) -> None:
        run = self.run
        run.step = record["step"]
        seconds, now = number(record.get("seconds")), number(record.get("time"))
        between = math.nan
        if "loss" in record:
            passed = seconds
            if self._time is not None and not math.isnan(now):
                passed = max(now - self._time, seconds)
                between = passed - seconds
            run.hours += 0 if math.isnan(passed) else passed / 3600
            run.tokens += number(record.get("tokens"), 0)
        run.tokens = number(record.get("tokens_so_far"), run.tokens)
        self._time = None if math.isnan(now) else now
        run.last_time = self._time or run.last_time
        place = (run.step, run.tokens, run.hours)
        if "loss" in record:
            run.skipped += bool(record.get("skipped"))
            figures = [number(record.get(name)) for name in COLUMNS[3:-1]]
            run.steps.add(np.array([*place, *figures, between]))
            self._load(record.get("experts"))
        if "val_loss" in record:
            self._evaluated(record, place)
        self._judge(record)

    def _evaluated(self, record: Mapping[str, Any], place: tuple[float, ...]) -> None:
        run, loss = self.run, number(record["val_loss"])
        run.held_out.add(np.array([*place, loss]))
        run.held_out_loss = loss
        if loss < math.inf and (run.best is None or loss < run.best[1]):
            run.best = run.step, loss
        if isinstance(sources := record.get("val_loss_by_source"), dict):
            run.by_source = {str(name): number(value) for name, value in sources.items()}

    def _load(self, layers: Any) -> None:
        """Take in the load of each expert, if the record has it."""
        run = self.run
        if not isinstance(layers, list) or not layers or any("load" not in layer for layer in layers):
            return
        shares: Row = np.array([layer["load"] for layer in layers], dtype=np.float64)
        if run.load is None:
            run.load_shape = shares.shape[0], shares.shape[1]
            run.load = Spans(max(8, min(COLUMNS_OF_HEAT, CELLS // (2 * shares.size))))
        if shares.shape == run.load_shape:
            run.load.add(np.concatenate([[float(run.step)], shares.ravel()]))

    def _event(self, event: Mapping[str, Any]) -> None:
        run, kind, step = self.run, str(event["event"]), event["step"]
        if kind == "sample":
            prompt = str(event.get("prompt", ""))
            run.samples.setdefault(prompt, Spread(SAMPLES)).add((step, str(event.get("text", ""))))
        elif kind == "tasks":
            run.tasks.add((step, event.get("tasks", {})))
        elif kind == "alarm":
            name, cure, text = (str(event.get(key, "")) for key in ("symptom", "cure", "message"))
            said = text.removeprefix(f"{name}: ").removesuffix(cure).rstrip(" .")
            self._found(name, cure, step, said)
        if kind == "start":
            self._time = None
            if self._alarms is None and not run.unjudged:
                self._begin(event)
        run.events.setdefault(kind, Spread(EVENTS)).add((step, str(event.get("message", ""))))

    # The symptoms

    def _begin(self, start: Mapping[str, Any]) -> None:
        """Set out to judge the run by the plan that its config and its first start tell."""
        run = self.run
        run.model = model_of(run, start)
        if run.config is None or run.model is None:
            run.unjudged = "the config or the shape of the model is not in the run folder, or of another version"
            return
        fresh = start.get("fresh", not run.settings.get("start_from"))
        finetuning = isinstance(run.config, FinetuneConfig)
        plan = Plan(run.config.train, run.model, bool(fresh), start.get("epochs") or {}, finetuning)
        self._alarms = Alarms(plan)
        for alarm in self._alarms.at_start():
            self._found(alarm.symptom.name, alarm.symptom.cure, alarm.step, alarm.said)

    def _judge(self, record: Mapping[str, Any]) -> None:
        if self._alarms is None and not self.run.unjudged:
            self._begin({})  # a run of before starts were events
        if self._alarms is None or self.run.unjudged:
            return
        try:
            for alarm in self._alarms.after(record):
                self._found(alarm.symptom.name, alarm.symptom.cure, alarm.step, alarm.said)
        except (KeyError, TypeError, ValueError, IndexError, ArithmeticError):
            self.run.unjudged = f"the record of step {self.run.step} lacks figures that the symptoms need"

    def _found(self, name: str, cure: str, step: int, said: str) -> None:
        found = self.run.findings.setdefault(name, Finding(name, cure, step, step, said))
        found.also(step, said)


def model_of(run: Run, start: Mapping[str, Any]) -> ModelConfig | None:
    """The model's shape: as the start says, by the config, or as a checkpoint keeps it."""
    if isinstance(run.config, PretrainConfig) and not start.get("model"):
        return run.config.model
    try:
        values = start.get("model") or checkpoint.read_section(checkpoint.resolve(run.folder), "model.yaml")
        return build_config(ModelConfig, values, str(run.folder))
    except MoeLmError:
        return None


def number(value: Any, otherwise: float = math.nan) -> float:
    """A figure of a record, where JSON has null for what is not finite."""
    return float(value) if isinstance(value, (int, float)) else otherwise


def column(rows: Row, names: Sequence[str], name: str) -> Row:
    """One figure of every span."""
    return rows[:, names.index(name)] if len(rows) else np.zeros(0)
