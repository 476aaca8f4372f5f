"""The training loop, of pretraining and fine-tuning alike: steps, evaluations, saves and signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import partial
from typing import Any

from moe_lm.checkpoint.checkpoint import DOUBTFUL, PINNED
from moe_lm.common.process import this_command
from moe_lm.common.signals import StopSignals, stop_signals
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.engine.engine import Engine
from moe_lm.engine.pace import Pace
from moe_lm.objective.scheduled_sampling import with_own_tokens
from moe_lm.parallel.watch import NO_WATCHDOG, Watchdog
from moe_lm.train.ahead import Ahead
from moe_lm.train.checkpoints import Checkpoints
from moe_lm.train.deadline import Deadline
from moe_lm.train.figures import step_record
from moe_lm.train.guards import Guard, Window
from moe_lm.train.log import RunLog, json_text
from moe_lm.train.probes import Probes
from moe_lm.train.result import TrainingResult
from moe_lm.train.timetable import Timetable


@dataclass(frozen=True)
class Training:
    """The parts of a run that the loop brings together."""

    engine: Engine
    batches: BatchSource
    validation: Sequence[Batch]
    config: TrainConfig
    checkpoints: Checkpoints
    log: RunLog
    flops_per_token: Callable[[int], float]  # forward and backward, in a step counted from 0
    before_step: Callable[[int], None] = lambda step: None  # called with each step, counted from 0
    leave_out: Callable[[Sequence[Window]], None] = lambda windows: None  # tells `batches` what rollbacks left out
    evaluate_first: bool = False  # evaluate before the first step too
    validation_sources: Sequence[tuple[str, int]] = ()  # of `validation`, in order, and how many batches are of each
    probes: Probes | None = None
    watchdog: Watchdog = NO_WATCHDOG
    timetable: Timetable | None = None  # moves the last step, in a single process
    kept_config: Callable[[TrainConfig], str] | None = None  # the run's config for a checkpoint, when steps moved


class Next(Enum):
    """What follows a step."""

    STEP = auto()
    ROLLBACK = auto()  # to a good checkpoint, then a step
    STOP = auto()  # a signal came, or the time is over
    END = auto()  # all steps are done, or the held-out loss has stopped falling


def train(run: Training, counters: Mapping[str, Any]) -> TrainingResult:
    """Train to the last step, evaluating, saving and logging on the way.

    `counters` is the trainer.json of the checkpoint that the engine has loaded, or empty. A run whose numbers go wrong
    goes back to a checkpoint, and ends with MoeLmError when that has not helped (guards.py).
    The last step is saved before the last evaluation. A stop signal ends it with a checkpoint after the current step or
    evaluation batch, and so does the end of `train.hours`. Before the first step is done, and as a second one, a signal
    ends the process at once.
    """
    with stop_signals() as signals, run.checkpoints:
        loop = Loop(run, counters, signals)
        with loop.ahead:
            follows = loop.begin()
            while follows in (Next.STEP, Next.ROLLBACK):
                if follows is Next.ROLLBACK:
                    loop.roll_back()
                follows = loop.step()
        loop.end(follows)
    if loop.result.stopped:
        run.log.message(f"stopped after step {loop.result.step}; to go on, run again: {this_command()}")
    return loop.result


class Loop:
    """What `train` repeats, and what it does before and after."""

    def __init__(self, run: Training, counters: Mapping[str, Any], signals: StopSignals) -> None:
        self.run, self.signals = run, signals
        self.deadline = Deadline(run.config.hours)
        self.result = TrainingResult()
        self._restore(counters)
        self.guard = Guard(run.config.guards, run.log, counters)
        self.batches = self.guard.batches(run.batches)
        self.ahead = Ahead(self._read, run.engine.device)
        run.leave_out(self.guard.memory.windows)
        self.pace = Pace(run.engine)
        self.unsaved = False  # whether a step was taken since the newest checkpoint was loaded or begun

    def begin(self) -> Next:
        """Evaluate what was not evaluated yet: the model that fine-tuning starts from, or a step that was saved."""
        run, result = self.run, self.result
        if self.guard.must_go_back:
            return Next.ROLLBACK
        if run.evaluate_first and run.validation and result.step == 0:
            held_out = self._evaluate()
            if held_out is None:
                return Next.STOP
            run.log.step({"step": 0, **held_out, **self._now()})
        elif lacks_evaluation(run, result) and (self._is_told_to_stop() or not self._evaluate_saved()):
            return Next.STOP
        return Next.END if is_finished(run.config, result) else Next.STEP

    def step(self) -> Next:
        """Train one step; then evaluate, log and save what is due."""
        run, result, checkpoints = self.run, self.result, self.run.checkpoints
        self.deadline.begin_step()
        record = self._train_step()
        if run.timetable is not None:
            run = self._keep_time(run.timetable)
        follows = self._judge(self._is_told_to_stop())
        is_last = follows is Next.END
        is_best = False
        if follows is Next.STEP and run.validation and is_due(result.step, run.config.eval_every):
            held_out = self._evaluate()
            if held_out is None:
                follows = Next.STOP
            else:
                record |= held_out
                is_best = result.note_evaluation(held_out["val_loss"])
                follows = self._judge()
        run.log.step(record, follows=is_last and bool(run.validation))
        if slow := self.pace.step(record["seconds"]):
            figures = {name: value for name, value in slow._asdict().items() if name != "name"}
            run.log.event("slow_rank", result.step, slow.text, **figures)
        self.deadline.end_step()
        result.owes_archive |= is_due(result.step, checkpoints.config.archive_every)
        due = is_due(result.step, checkpoints.config.every) or result.owes_archive
        if self.guard.may_save(due or (is_best and checkpoints.config.best)) and follows is Next.STEP:
            follows = self._start_save()
            if run.config.hours is not None and follows is Next.STEP and self._is_told_to_stop():
                follows = Next.STOP  # the save took the time that was left for a step
        checkpoints.note_saves(result.step)
        return follows

    def roll_back(self) -> None:
        """Load the newest good checkpoint into the engine, and go on from there with later data.

        Raises MoeLmError if there is none, or the run has gone back as often as it may.
        """
        run, step = self.run, self.result.step
        self.ahead.forget()  # other data follows
        run.checkpoints.wait(step)
        self.guard.check_rollback(step)
        counters = run.checkpoints.go_back(step)
        if counters is None:
            why = f"{self.guard.trouble}, and there is no good checkpoint to go back to"
            raise self.guard.give_up_error(step, why)
        self.guard.go_back(step, counters, run.checkpoints.newest)
        run.leave_out(self.guard.memory.windows)
        self._restore(counters)
        self.unsaved = False
        with run.watchdog.patiently("loading"):  # metrics.jsonl may be long
            run.log.rewind(self.result.step)

    def end(self, follows: Next) -> None:
        """Save the last step, and evaluate it if it was the last of all."""
        run, result, checkpoints = self.run, self.result, self.run.checkpoints
        result.stopped = follows is Next.STOP
        if result.stopped:
            cause = self.deadline.cause if self._is_time_over() and not self.signals else self.signals.cause
            run.log.event("stop", result.step, f"stopping after step {result.step}: {cause}")
        elif result.step < run.config.steps:
            run.log.event("early_stop", result.step, result.ended_early(), show=False)  # closing_lines show it
        if self.unsaved:
            checkpoints.wait(result.step)
            state = run.engine.state()
            self.guard.check_end(result.step, state, finished=not result.stopped)
            files = self._files_of_step()
            result.checkpoint = checkpoints.save(result.step, state, files, self._is_told_to_stop)
            if result.step == run.config.steps and run.validation and not result.stopped:
                result.stopped = not self._evaluate_saved()
            checkpoints.clean()

    def _restore(self, counters: Mapping[str, Any]) -> None:
        self.result.restore(counters)
        if "tokens" not in counters and self.result.step:  # of an older version
            self.result.tokens = self.run.log.logged_tokens(self.result.step)

    def _train_step(self) -> dict[str, Any]:
        """Take a step; returns its record of metrics.jsonl."""
        run, engine, result = self.run, self.run.engine, self.result
        started = time.perf_counter()
        step = result.step
        run.before_step(step)
        run.watchdog.at("reading", step + 1)
        asked = time.perf_counter()
        with self.pace.reading():
            read = self.ahead.take(step, last=run.config.steps - 1)
        waited = time.perf_counter() - asked
        found = engine.train_step(step, read.micro_batches, loss_limit=self.guard.loss_limit)
        run.watchdog.at("after the step")
        seconds = time.perf_counter() - started
        result.note_step(found.loss, found.tokens)
        self.unsaved = True
        with_load = run.log.has_load(result.step)
        record = step_record(
            result.step, found, seconds, waited, read.seconds, engine, run.flops_per_token(step), with_load
        )
        record |= self._now()
        self.guard.judge(result.step, found)
        return record

    def _read(self, step: int) -> list[Batch]:
        return local_micro_batches(self.run.engine, self.batches, self.run.config, step)

    def _now(self) -> dict[str, Any]:
        """When a record is written, and after how many tokens."""
        return {"time": time.time(), "tokens_so_far": self.result.tokens}

    def _keep_time(self, timetable: Timetable) -> Training:
        """Move the last step to where the time that is left ends; returns the run with it."""
        train = timetable.fit(self.result.step)
        if train is not self.run.config:
            self.run = replace(self.run, config=train)
            self.run.engine.config = train
            self.run.log.move_last_step(train.steps)
        return self.run

    def _judge(self, stop: bool = False) -> Next:
        """What follows the step that was taken, if some rank is told to stop or not."""
        if is_finished(self.run.config, self.result) and not self.guard.must_go_back:
            return Next.END
        if stop:
            return Next.STOP
        return Next.ROLLBACK if self.guard.must_go_back else Next.STEP

    def _wants_to_stop(self, is_saved: bool = False) -> bool:
        """Whether this rank has received a signal, or knows that the time is over."""
        return bool(self.signals) or self._is_time_over(is_saved)

    def _is_time_over(self, is_saved: bool = False) -> bool:
        checkpoints = self.run.checkpoints
        saves = 1 + checkpoints.is_saving  # the last save waits for the one under way
        return self.run.engine.topology.is_main and self.deadline.is_near(checkpoints.longest_save, is_saved, saves)

    def _is_told_to_stop(self) -> bool:
        """Whether some rank has received a signal. After the first call, a signal no longer ends its process at once.

        On no rank before all ranks have come here: one that still ended at once would be lost to those that do not.
        """
        stop = self.run.engine.any_rank(self._wants_to_stop())
        self.signals.defer()
        return stop

    def _start_save(self) -> Next:
        """Begin a checkpoint, unless some value of the state is not finite: then the run must go back."""
        state = self.run.engine.state()
        if not self.guard.is_sound(self.result.step, state):
            return Next.ROLLBACK
        self.run.checkpoints.start(self.result.step, state, self._files_of_step())
        self.unsaved = False
        return Next.STEP

    def _files_of_step(self) -> dict[str, str]:
        """The files beside the tensors that are of this step: its counters, and what becomes of the checkpoint."""
        files = {}
        if self.guard.trouble:
            files[DOUBTFUL] = self.guard.trouble
        elif self.result.owes_archive:
            files[PINNED] = f"archived, as checkpoint.archive_every={self.run.checkpoints.config.archive_every}\n"
            self.result.owes_archive = False
        if self.run.kept_config is not None:
            files["config.yaml"] = self.run.kept_config(self.run.config)
        counters = {
            **self.result.counters(),
            "guard": self.guard.memory.model_dump(),
            "processes": self.run.engine.topology.world_size,
        }
        return {**files, "trainer.json": json_text(counters)}

    def _evaluate(self, is_saved: bool = False) -> dict[str, Any] | None:
        """The held-out figures of this step; what the probes find goes to the log.

        None if a signal came before the end, or the time was over.
        """
        run, step = self.run, self.result.step
        wants_to_stop = partial(self._wants_to_stop, is_saved)
        held_out = evaluate(run, wants_to_stop)
        if held_out is None or run.probes is None:
            return held_out

        def heed() -> bool:
            run.watchdog.at("evaluating")
            return run.engine.any_rank(wants_to_stop())

        events = run.probes.ask(run.engine, step, heed)
        for kind, text, fields in events or ():
            run.log.event(kind, step, text, **fields)
        return None if events is None else held_out

    def _evaluate_saved(self) -> bool:
        """Evaluate the step of the newest checkpoint, and keep the loss beside it and in the log.

        False if a signal came before the end.
        """
        held_out = self._evaluate(is_saved=True)
        with self.run.watchdog.patiently("saving"):  # metrics.jsonl may be long
            if held_out is not None:
                self.result.note_evaluation(held_out["val_loss"])
                self.run.checkpoints.note_held_out_loss(held_out["val_loss"])
            self.run.log.amend(self.result.step, held_out or {})
        return held_out is not None


def local_micro_batches(engine: Engine, batches: BatchSource, config: TrainConfig, step: int) -> list[Batch]:
    """This rank's rows of the global batch of `step`, cut into micro-batches."""
    rows = engine.topology.rows_of(config.global_batch_size)
    size = config.rows_at_once(engine.topology.row_groups)
    pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [batches.batch(step, piece) for piece in pieces]
    if (sampling := config.scheduled_sampling) is None:
        return found
    return [
        with_own_tokens(batch, sampling, config.seed, step, piece) for batch, piece in zip(found, pieces, strict=True)
    ]


def evaluate(run: Training, wants_to_stop: Callable[[], bool]) -> dict[str, Any] | None:
    """The held-out `val_loss` and other figures of metrics.jsonl: means over target tokens (in nats) or pairs.

    The loss is given by source too if there are several. None if some rank `wants_to_stop` before the end.
    """
    sums: dict[str, float] = {}
    units = 0
    by_source: dict[str, list[float]] = {}  # the sum of losses, and the units
    for source, start, stop in pieces(run):
        if run.engine.any_rank(wants_to_stop()):
            return None
        run.watchdog.at("evaluating")
        found = run.engine.evaluate(run.validation[start:stop])
        sums = {name: sums.get(name, 0.0) + more for name, more in found.sums.items()}
        units += found.units
        loss, count = by_source.get(source, (0.0, 0))
        by_source[source] = [loss + found.sums["loss"], count + found.units]
    figures: dict[str, Any] = {f"val_{name}": total / max(1, units) for name, total in sums.items()}
    if len(by_source) > 1:
        figures["val_loss_by_source"] = {source: loss / max(1, count) for source, (loss, count) in by_source.items()}
    return figures


def pieces(run: Training) -> Iterator[tuple[str, int, int]]:
    """The held-out batches that the ranks evaluate at once, all of one source: its name, the first, and their end."""
    at_once, begin = run.engine.topology.row_groups, 0
    for source, count in run.validation_sources or [("", len(run.validation))]:
        for start in range(begin, begin + count, at_once):
            yield source, start, min(start + at_once, begin + count)
        begin += count


def is_finished(config: TrainConfig, result: TrainingResult) -> bool:
    """Whether all steps are done, or the held-out loss has not been lower for so long that the run ends early."""
    patience = math.inf if config.early_stopping is None else config.early_stopping
    return result.step >= config.steps or result.evaluations_since_best >= patience


def lacks_evaluation(run: Training, result: TrainingResult) -> bool:
    """Whether a signal ended the evaluation of the step that this run goes on after."""
    due = result.step == run.config.steps or is_due(result.step, run.config.eval_every)
    return bool(run.validation) and result.step > 0 and due and result.validation_loss is None


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
