"""The recent past of a run in constant memory: what its records in `metrics.jsonl` say, for the table of symptoms."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from moe_lm.config.model import ModelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.train.spikes import RECENT, loss_limit

WINDOW = 10  # steps between two looks
ROW = 20  # steps in a row for which a symptom has to show
KEPT_WINDOWS = 50

Record = Mapping[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Plan:
    """What a run sets out to do."""

    train: TrainConfig
    model: ModelConfig
    fresh: bool = True  # from fresh weights, not from those of another run
    epochs: Mapping[str, float] = field(default_factory=dict)  # over the whole run, by source; empty: unknown
    finetuning: bool = False


class Window(NamedTuple):
    """The figures of WINDOW steps together."""

    loss: float  # mean of the steps that were not skipped; NaN without any
    seconds: float
    data_seconds: float
    tokens: int
    dead: tuple[int, ...]  # of each MoE layer, the experts without a token in all steps: bit e for expert e


class Evaluated(NamedTuple):
    """An evaluation on held-out text, with the training loss of that time."""

    step: int
    held_out: float
    training: float  # mean of the steps before; NaN before the first


class Past:
    """The newest records, windows and evaluations of a run."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.layers = plan.model.moe_layers
        self.records: deque[Record] = deque(maxlen=ROW)
        self.windows: deque[Window] = deque(maxlen=KEPT_WINDOWS)
        self.start: int | None = None  # the first step that was seen
        self.first_loss: float | None = None  # of the first step that was not skipped
        self.usual: deque[float] = deque(maxlen=RECENT)  # losses within their range
        self.loss_limit = math.inf  # the end of that range before the newest window
        self.spikes: list[Record] = []  # of the newest window
        self.opening: list[float] = []  # mean losses of the first windows
        self.best: Evaluated | None = None
        self.since_best: deque[Evaluated] = deque(maxlen=2)
        self.memory: dict[str, Lows] = {"host_bytes": Lows(), "device_bytes": Lows()}
        self.rate_sum = 0.0  # of the steps that moved weights, each as a share of the peak rate
        self._unread = 0  # records since the newest window

    @property
    def step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    def evaluated(self, record: Record) -> None:
        """Take in a record with `val_loss`."""
        training = mean_loss(self.records) if self.records else math.nan
        found = Evaluated(record["step"], number(record["val_loss"]), training)
        if math.isnan(found.held_out):
            return
        if self.best is None or found.held_out < self.best.held_out:
            self.best = found
            self.since_best.clear()
        else:
            self.since_best.append(found)

    def add(self, record: Record) -> bool:
        """Take in the record of a step; returns whether it ends a window."""
        if self.records and record["step"] <= self.step:
            self._go_back(record["step"])
        self.start = self.start or record["step"]
        self.records.append(record)
        if not record["skipped"]:
            self.first_loss = record["loss"] if self.first_loss is None else self.first_loss
            self.rate_sum += record["lr"] / self.plan.train.optimizer.lr
        self._unread += 1
        if self._unread < WINDOW:
            return False
        self._unread = 0
        newest = list(self.records)[-WINDOW:]
        self.windows.append(summary(newest))
        self._find_spikes(newest)
        if len(self.opening) < ROW // WINDOW:
            self.opening.append(self.windows[-1].loss)
        for name, lows in self.memory.items():
            if name in record:
                lows.add(min(each[name] for each in newest))
        return True

    def _find_spikes(self, newest: Sequence[Record]) -> None:
        self.loss_limit = loss_limit(self.usual, self.plan.train.guards.spike_threshold)
        self.spikes = [record for record in newest if self.loss_limit < number(record["loss"]) < math.inf]
        losses = (record["loss"] for record in newest if not record["skipped"])
        self.usual.extend(loss for loss in losses if loss <= self.loss_limit)

    def has_a_row_of_steps(self) -> bool:
        """Whether ROW steps in a row changed the weights."""
        return len(self.records) == ROW and not any(record["skipped"] for record in self.records)

    def newest_windows(self, steps: int) -> list[Window]:
        """The windows of the last `steps` steps, or of all since the run began or went back."""
        return list(self.windows)[-(steps // WINDOW) :]

    def _go_back(self, step: int) -> None:
        """The run went back to before `step`: what came after is no longer its past."""
        if self.best is not None and self.best.step >= step:
            self.best = None
        self.records.clear()
        self.windows.clear()
        self.since_best.clear()
        self._unread = 0


class Lows:
    """The lowest values of a figure over equal spans of the run: between COUNT and 2 * COUNT of them, however long."""

    COUNT = 20

    def __init__(self) -> None:
        self.values: list[int] = []
        self.windows = 1  # of a span
        self._open: list[int] = []

    def add(self, low: int) -> None:
        """Take in the lowest value of a window."""
        self._open.append(low)
        if len(self._open) == self.windows:
            self.values.append(min(self._open))
            self._open.clear()
        if len(self.values) == 2 * self.COUNT:
            self.values = [min(pair) for pair in zip(self.values[::2], self.values[1::2], strict=True)]
            self.windows *= 2


def summary(records: Sequence[Record]) -> Window:
    """The figures of these records together."""
    return Window(
        loss=mean_loss(records),
        seconds=sum(record["seconds"] for record in records),
        data_seconds=sum(record.get("data_seconds", 0.0) for record in records),
        tokens=sum(record["tokens"] for record in records),
        dead=tuple(
            never_used(records, place) if "dead_experts" in layer else 0
            for place, layer in enumerate(records[-1].get("experts", ()))
        ),
    )


def never_used(records: Sequence[Record], place: int) -> int:
    """The experts of a MoE layer that had no token in any of the records: bit e for expert e."""
    dead = -1
    for record in reversed(records):
        dead &= int(record["experts"][place].get("dead_experts", "0"), 16)
        if not dead:
            return 0
    return dead


def mean_loss(records: Iterable[Record]) -> float:
    """The mean loss of the steps that were not skipped; NaN without any."""
    losses = [record["loss"] for record in records if not record["skipped"]]
    return statistics.fmean(losses) if losses else math.nan


def number(value: float | None) -> float:
    """A figure of a record, where JSON has null for what is not finite."""
    return math.nan if value is None else float(value)
