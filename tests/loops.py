"""The training loop around a tiny model, in a folder of its own."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint.recovery import newest_sound
from moe_lm.config.run import CheckpointConfig, LogConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.data.order import data_step
from moe_lm.engine.engine import Engine
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import LossParts
from moe_lm.train.alarms import Alarms
from moe_lm.train.checkpoints import Checkpoints, load
from moe_lm.train.guards import Window
from moe_lm.train.log import RunLog
from moe_lm.train.loop import Training, train
from moe_lm.train.past import Plan
from moe_lm.train.result import TrainingResult
from tests.processes import events, metrics
from tests.tiny import engine_of, tiny_model


class Watched:
    """The batches of another source; a LoopRun calls `at` when a step begins, with that of its data."""

    fingerprint = "watched"

    def __init__(self, source: BatchSource, at: Callable[[int], None] = lambda step: None) -> None:
        self.source, self.at = source, at

    def batch(self, step: int, rows: range) -> Batch:
        return self.source.batch(step, rows)


class Marked:
    """The batches of another source, which know the step that they were read for."""

    fingerprint = "marked"

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def batch(self, step: int, rows: range) -> Batch:
        batch = self.source.batch(step, rows)
        batch.cu_seqlens.data_step = step  # type: ignore[attr-defined]
        return batch


class LeftOut:
    """The batches of another source without the data of some steps."""

    fingerprint = "left out"

    def __init__(self, source: BatchSource, *steps: range) -> None:
        self.source, self.steps = source, steps

    def batch(self, step: int, rows: range) -> Batch:
        kept = [number for number in range(1000) if not any(number in left_out for left_out in self.steps)]
        return self.source.batch(kept[step], rows)


def spoil(engine: Engine, source: BatchSource, factor: Callable[[int], float]) -> BatchSource:
    """The source's batches; the loss of the data of step `step` (counted from 0) is multiplied by `factor(step)`."""

    def multiply(loss: Any, given: Any, parts: LossParts) -> LossParts | None:
        if not loss.training or (by := factor(given[0].cu_seqlens.data_step)) == 1:
            return None
        return parts._replace(loss=parts.loss * by, sums={**parts.sums, "loss": parts.sums["loss"] * by})

    engine.loss.register_forward_hook(multiply)
    return Marked(source)


class LoopRun:
    """Six steps of four rows; each call starts the loop anew, or goes on from the newest checkpoint.

    `poison` multiplies the loss of a step's data, counted from 0.
    """

    windows: Sequence[Window] = ()

    def __init__(
        self,
        folder: Path,
        source: BatchSource,
        validation: Sequence[Batch] | None = None,
        evaluate_first: bool = False,
        make_model: Callable[[], LanguageModel] = lambda: tiny_model(seed=3, num_hidden_layers=2),
        fresh: bool = True,
        save_every: int = 0,
        keep: int = 2,
        background: bool = False,
        best: bool = False,
        archive_every: int = 0,
        poison: Callable[[int], float] = lambda step: 1.0,
        **train: Any,
    ) -> None:
        self.folder, self.source, self.evaluate_first, self.poison = folder, source, evaluate_first, poison
        self.validation = [source.batch(100 + n, range(2)) for n in (0, 1)] if validation is None else validation
        self.make_model, self.fresh = make_model, fresh
        self.checkpoint = CheckpointConfig(
            every=save_every, keep=keep, background=background, best=best, archive_every=archive_every
        )
        self.config = TrainConfig(**{"steps": 6, "global_batch_size": 4, "precision": "float32"} | train)

    def __call__(self) -> TrainingResult:
        self.folder.mkdir(exist_ok=True)
        self.engine = self.build()
        source = spoil(self.engine, self.source, self.poison)
        counters = load(self.engine, newest_sound(self.folder / "checkpoints").folder)
        self.plan = Plan(self.config, self.engine.model.config, self.fresh)
        start, is_main = counters.get("step", 0), self.engine.topology.is_main
        log_config, steps = LogConfig(every=3), self.config.steps
        with RunLog(self.folder, log_config, steps, "test", start, is_main, Alarms(self.plan)) as log:
            self.training = Training(
                engine=self.engine, batches=source, validation=self.validation, config=self.config,
                checkpoints=Checkpoints(
                    self.folder / "checkpoints", self.checkpoint, self.engine, log, {"config.yaml": "a: 1\n"}
                ),
                log=log, flops_per_token=lambda step: 1e6, evaluate_first=self.evaluate_first,
                leave_out=self.leave_out, before_step=self.before_step,
            )  # fmt: skip
            return train(self.training, counters)

    def leave_out(self, windows: Sequence[Window]) -> None:
        self.windows = windows
        getattr(self.source, "leave_out", lambda windows: None)(windows)

    def before_step(self, step: int) -> None:
        getattr(self.source, "at", lambda step: None)(data_step(step, self.windows))

    def build(self) -> Engine:
        return engine_of(self.make_model(), self.config)

    @property
    def records(self) -> list[dict[str, Any]]:
        return metrics(self.folder)

    @property
    def events(self) -> list[dict[str, Any]]:
        """All but alarms and saves."""
        return [event for event in events(self.folder) if event["event"] not in ("alarm", "save")]

    @property
    def kinds(self) -> list[tuple[str, int]]:
        """The kinds of the events, each with its step."""
        return [(event["event"], event["step"]) for event in self.events]

    def trainer(self, step: int) -> dict[str, Any]:
        """The trainer.json of a step's checkpoint, which is JSON to the letter."""
        file = self.folder / "checkpoints" / f"step-{step:08d}" / "trainer.json"
        found: dict[str, Any] = json.loads(file.read_text(), parse_constant=pytest.fail)
        return found

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.records]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.state().items()}


def poisoned(folder: Path, source: BatchSource, *steps: int, by: float = math.nan, **settings: Any) -> LoopRun:
    """12 steps, saved after every fourth; the loss of the data of these steps, counted from 0, is multiplied."""
    guards = {"max_skipped": 3, **settings.pop("guards", {})}
    settings = {"steps": 12, "save_every": 4, "keep": 9, "eval_every": 3, "guards": guards, **settings}
    return LoopRun(folder, source, poison=lambda step: by if step in steps else 1.0, **settings)


def sigterm() -> None:
    """Send this process SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)  # another thread takes it
