"""The training loop, of pretraining and fine-tuning alike: steps, evaluations, saves and signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.checkpoint import checkpoint, retain
from moe_lm.checkpoint.recovery import Found, newest_sound
from moe_lm.checkpoint.saver import Saver
from moe_lm.common.process import this_command
from moe_lm.common.signals import stop_signals
from moe_lm.config.run import CheckpointConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.engine.engine import Engine
from moe_lm.engine.pace import Pace
from moe_lm.objective.scheduled_sampling import with_own_tokens
from moe_lm.parallel.watch import NO_WATCHDOG, Watchdog
from moe_lm.train.figures import step_record
from moe_lm.train.guards import Guard
from moe_lm.train.log import RunLog, json_text


@dataclass(frozen=True)
class Training:
    """The parts of a run that the loop brings together."""

    engine: Engine
    batches: BatchSource
    validation: Sequence[Batch]
    config: TrainConfig
    checkpoint: CheckpointConfig
    checkpoints: Path
    log: RunLog
    files: Mapping[str, str]  # beside the tensors of every checkpoint, by name
    flops_per_token: float  # forward and backward
    reload: Callable[[Path], dict[str, Any]]  # load a checkpoint that was verified, and return its trainer.json
    keep_lock: Callable[[], object] = lambda: None  # before each save: raises MoeLmError if another run writes here
    evaluate_first: bool = False  # evaluate before the first step too
    watchdog: Watchdog = NO_WATCHDOG


MEASURED_LATER = "measured_later"  # among the counters: the held-out loss of a step that was saved before


class Best(NamedTuple):
    """The evaluation with the lowest held-out loss."""

    step: int
    loss: float


@dataclass
class TrainingResult:
    """The end of the loop; `stopped` if a signal left something to do: steps, or the last evaluation."""

    step: int = 0
    stopped: bool = False
    loss: float = math.nan
    validation_loss: float | None = None  # of this step: nats per token, or the mean loss of a pair
    best: Best | None = None
    worse: int = 0  # evaluations in a row since the best
    checkpoint: Path | None = None

    def counters(self) -> dict[str, Any]:
        """What trainer.json holds of it."""
        best = {"step": self.best.step, "loss": self.best.loss} if self.best else None
        return {
            "step": self.step, "loss": self.loss, "validation_loss": self.validation_loss, "best": best,
            "worse": self.worse,
        }  # fmt: skip

    def take(self, counters: Mapping[str, Any]) -> None:
        """Take up the counters of a checkpoint; empty ones are those of the start."""
        self.step = int(counters.get("step", 0))
        self.loss = math.nan if counters.get("loss") is None else float(counters["loss"])
        self.validation_loss = counters.get("validation_loss")
        self.best = Best(**counters["best"]) if counters.get("best") else None
        self.worse = counters.get("worse", 0)
        if self.validation_loss is None and counters.get(MEASURED_LATER) is not None:
            self.is_best(counters[MEASURED_LATER])

    def is_best(self, loss: float) -> bool:
        """Take note of an evaluation at this step, and say whether it is the best so far."""
        self.validation_loss = loss
        better = self.best is None or loss < self.best.loss
        if better and math.isfinite(loss):
            self.best, self.worse = Best(self.step, loss), 0
            return True
        self.worse += 1
        return False


def train(run: Training, counters: Mapping[str, Any]) -> TrainingResult:
    """Train to the last step, evaluating, saving and logging on the way.

    `counters` is the trainer.json of the checkpoint that the engine has loaded, or empty. A run whose numbers go wrong
    goes back to a checkpoint, and ends with MoeLmError when that has not helped (guards.py).
    The last step is saved before the last evaluation. A stop signal ends it with a checkpoint after the current step or
    evaluation batch. Before the first step is done, and as a second one, it ends the process at once.
    """
    config, engine = run.config, run.engine
    result = TrainingResult()
    result.take(counters)
    start_step = result.step
    guard = Guard(config.guards, run.log, counters)
    batches = guard.batches(run.batches)
    pace = Pace(engine)
    with stop_signals() as signalled, Saver(run.checkpoints, run.checkpoint, run.watchdog) as saver:
        if run.evaluate_first and run.validation and start_step == 0:
            before = evaluate(run, signalled)
            if before is None:
                result.stopped = True
            else:
                run.log.step({"step": 0, **before})
        elif lacks_evaluation(run, result):
            signalled.hold()
            evaluate_saved(run, result, signalled, checkpoint.latest(run.checkpoints))
        while (guard.must_go_back or not is_finished(config, result)) and not result.stopped:
            if guard.must_go_back:
                go_back(run, guard, saver, result)
            started = time.perf_counter()
            run.watchdog.at("reading", result.step + 1)
            with pace.reading():
                micro_batches = local_micro_batches(engine, batches, config, result.step)
            data_seconds = time.perf_counter() - started
            step_result = engine.train_step(result.step, micro_batches, loss_limit=guard.loss_limit)
            run.watchdog.at("after the step")
            seconds = time.perf_counter() - started
            signalled.hold()
            result.step += 1
            result.loss, result.validation_loss, is_best = step_result.loss, None, False
            record = step_record(result.step, step_result, seconds, data_seconds, engine, run.flops_per_token)
            guard.judge(result.step, step_result)
            last = result.step == config.steps and not guard.must_go_back
            result.stopped = engine.any_rank(bool(signalled)) and not last
            unstopped = not result.stopped and not guard.must_go_back
            if run.validation and unstopped and not last and is_due(result.step, config.eval_every):
                held_out = evaluate(run, signalled)
                if held_out is None:
                    result.stopped = True
                else:
                    record |= held_out
                    is_best = result.is_best(held_out["val_loss"])
            run.log.step(record, follows=last and bool(run.validation))
            if slow := pace.step(seconds):
                rank, own, others, text = slow
                run.log.event("slow_rank", result.step, text, rank=rank, seconds=own, others_seconds=others)
            due = any(is_due(result.step, every) for every in (run.checkpoint.every, run.checkpoint.archive_every))
            save = guard.may_save(due or (is_best and run.checkpoint.best))
            if save and not last and not result.stopped and not is_finished(config, result):
                start_save(run, guard, saver, result)
            note_saves(run, saver, result)
        if result.stopped:
            run.log.event("stop", result.step, f"stopping after step {result.step}: {signalled.cause}")
        if result.stopped or result.step > start_step:
            saver.wait()
            note_saves(run, saver, result)
            state = engine.state()
            guard.check_end(result.step, state, finished=not result.stopped)
            run.keep_lock()
            files = files_of_step(run, result, guard)
            result.checkpoint = saver.save(
                result.step,
                state,
                files,
                is_over=lambda: engine.any_rank(bool(signalled)),
                tell=lambda text: run.log.event("full_disk", result.step, f"warning: {text}"),
            )
            if result.step == config.steps and run.validation and not result.stopped:
                evaluate_saved(run, result, signalled, result.checkpoint)
            if engine.topology.is_main:
                retain.clean(run.checkpoints, run.checkpoint)
    if result.stopped:
        run.log.message(f"stopped after step {result.step}; to go on, run again: {this_command()}")
    return result


def local_micro_batches(engine: Engine, batches: BatchSource, config: TrainConfig, step: int) -> list[Batch]:
    """This rank's rows of the global batch of `step`, cut into micro-batches."""
    rows = engine.topology.rows_of(config.global_batch_size)
    size = config.rows_at_once(engine.topology.world_size)
    pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [batches.batch(step, piece) for piece in pieces]
    if (sampling := config.scheduled_sampling) is None:
        return found
    return [
        with_own_tokens(batch, sampling, config.seed, step, piece) for batch, piece in zip(found, pieces, strict=True)
    ]


def evaluate(run: Training, signalled: Sequence[int]) -> dict[str, float] | None:
    """The held-out `val_loss` and other figures of metrics.jsonl: means over target tokens (in nats) or pairs.

    None if a signal came before the end.
    """
    engine, at_once = run.engine, run.engine.topology.world_size
    sums: dict[str, float] = {}
    units = 0
    for start in range(0, len(run.validation), at_once):
        if engine.any_rank(bool(signalled)):
            return None
        run.watchdog.at("evaluating")
        found = engine.evaluate(run.validation[start : start + at_once])
        sums = {name: sums.get(name, 0.0) + more for name, more in found.sums.items()}
        units += found.units
    return {f"val_{name}": total / max(1, units) for name, total in sums.items()}


def is_finished(config: TrainConfig, result: TrainingResult) -> bool:
    """Whether all steps are done, or the held-out loss has not been lower for so long that the run ends early."""
    return result.step >= config.steps or (config.early_stopping is not None and result.worse >= config.early_stopping)


def lacks_evaluation(run: Training, result: TrainingResult) -> bool:
    """Whether a signal ended the evaluation of the step that this run goes on after."""
    due = result.step == run.config.steps or is_due(result.step, run.config.eval_every)
    return bool(run.validation) and result.step > 0 and due and result.validation_loss is None


def evaluate_saved(run: Training, result: TrainingResult, signalled: Sequence[int], folder: Path | None) -> None:
    """Evaluate the step of a checkpoint that is there already, and keep the loss beside it and in the log."""
    held_out = evaluate(run, signalled)
    if held_out is None:
        result.stopped = True
    else:
        result.is_best(held_out["val_loss"])
        if folder is not None and run.engine.topology.is_main:
            retain.note_held_out_loss(folder, held_out["val_loss"])
    run.log.amend(result.step, held_out or {})


def report_damage(log: RunLog, found: Found, step: int) -> None:
    """An event for every damaged checkpoint that was passed over."""
    for name, text in found.lines.items():
        log.event("damaged_checkpoint", step, f"warning: {text}", checkpoint=name, damage=found.damaged[name])


def start_save(run: Training, guard: Guard, saver: Saver, result: TrainingResult) -> None:
    """Begin a checkpoint, unless some value of the state is not finite: then the guard wants to go back."""
    state = run.engine.state()
    if guard.is_sound(state):
        run.keep_lock()
        saver.start(result.step, state, files_of_step(run, result, guard))


def go_back(run: Training, guard: Guard, saver: Saver, result: TrainingResult) -> None:
    """Load the newest good checkpoint into the engine, and go on from there with later data.

    Raises MoeLmError if there is none, or the run has gone back as often as it may.
    """
    saver.wait()
    note_saves(run, saver, result)
    guard.check_rollback(result.step)
    with run.watchdog.patiently("loading"):
        found = newest_sound(run.checkpoints, run.checkpoint.on_damage, good=True)
        if found.folder is None:
            raise guard.stop(result.step, f"{guard.trouble}, and there is no good checkpoint to go back to")
        counters = run.reload(found.folder)
        report_damage(run.log, found, result.step)
        if run.engine.topology.is_main:
            retain.drop_after(run.checkpoints, counters["step"])
    guard.go_back(result.step, counters, found.folder if run.engine.topology.is_main else None)
    result.take(counters)
    run.log.rewind(result.step)


def files_of_step(run: Training, result: TrainingResult, guard: Guard) -> dict[str, str]:
    """The files beside the tensors, with the counters of this step."""
    files = {**run.files, "trainer.json": json_text({**result.counters(), "guard": guard.memory.model_dump()})}
    if guard.trouble:
        files[checkpoint.DOUBTFUL] = guard.trouble
    elif is_due(result.step, run.checkpoint.archive_every):
        files[checkpoint.PINNED] = f"archived, as checkpoint.archive_every={run.checkpoint.archive_every}\n"
    return files


def note_saves(run: Training, saver: Saver, result: TrainingResult) -> None:
    """Take note of finished saves. A failed one, as on a full disk, does not end a run that has steps left."""
    for step, folder, error, given_up in saver.outcomes():
        if given_up:
            text = f"warning: the disk is full: gave up {', '.join(given_up)} for the checkpoint of step {step}"
            run.log.event("full_disk", result.step, text)
        if error is None:
            result.checkpoint = folder
        else:
            run.log.event("failed_save", step, f"warning: no checkpoint at step {step}: {error}; training goes on")


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
