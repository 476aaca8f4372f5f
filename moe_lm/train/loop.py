"""The training loop, of pretraining and fine-tuning alike: steps, evaluations, saves and signals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.saver import Saver
from moe_lm.common.process import this_command
from moe_lm.common.signals import stop_signals
from moe_lm.config.run import CheckpointConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.engine.engine import Engine
from moe_lm.engine.pace import Pace
from moe_lm.objective.scheduled_sampling import with_own_tokens
from moe_lm.parallel.process_group import Ranks
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
    reload: Callable[[int], dict[str, Any]]  # after this step, load the newest checkpoint and return its trainer.json
    evaluate_first: bool = False  # evaluate before the first step too
    watchdog: Watchdog = NO_WATCHDOG


@dataclass
class TrainingResult:
    """The end of the loop; `stopped` if a signal came before the last step."""

    step: int = 0
    stopped: bool = False
    loss: float = math.nan
    validation_loss: float | None = None  # nats per token, or the mean loss of a pair
    checkpoint: Path | None = None

    def counters(self) -> dict[str, Any]:
        """What trainer.json holds of it."""
        return {"step": self.step, "loss": self.loss, "validation_loss": self.validation_loss}

    def take(self, counters: Mapping[str, Any]) -> None:
        """Take up the counters of a checkpoint; empty ones are those of the start."""
        self.step = int(counters.get("step", 0))
        self.loss = math.nan if counters.get("loss") is None else float(counters["loss"])
        self.validation_loss = counters.get("validation_loss")


def train(run: Training, counters: Mapping[str, Any]) -> TrainingResult:
    """Train to the last step, evaluating, saving and logging on the way.

    `counters` is the trainer.json of the checkpoint that the engine has loaded, or empty. A run whose numbers go wrong
    goes back to a checkpoint, and ends with MoeLmError when that has not helped (guards.py).
    A stop signal ends it with a checkpoint after the current step or evaluation batch; only the evaluation after the
    last step is still finished. Before the first step is done, and as a second one, it ends the process at once.
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
        while (guard.must_go_back or result.step < config.steps) and not result.stopped:
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
            result.loss = step_result.loss
            record = step_record(result.step, step_result, seconds, data_seconds, engine, run.flops_per_token)
            guard.judge(result.step, step_result)
            last = result.step == config.steps and not guard.must_go_back
            result.stopped = engine.any_rank(bool(signalled)) and not last
            unstopped = not result.stopped and not guard.must_go_back
            if run.validation and unstopped and (last or is_due(result.step, config.eval_every)):
                held_out = evaluate(run, () if last else signalled)
                if held_out is None:
                    result.stopped = True
                    result.validation_loss = None
                else:
                    record |= held_out
                    result.validation_loss = held_out["val_loss"]
            run.log.step(record)
            if slow := pace.step(seconds):
                rank, own, others, text = slow
                run.log.event("slow_rank", result.step, text, rank=rank, seconds=own, others_seconds=others)
            save = guard.may_save(is_due(result.step, run.checkpoint.every))
            if save and not last and not result.stopped:
                start_save(run, guard, saver, result)
            note_saves(run, saver, result)
        if result.stopped:
            run.log.event("stop", result.step, f"stopping after step {result.step}: {signalled.cause}")
        if result.stopped or result.step > start_step:
            saver.wait()
            note_saves(run, saver, result)
            state = engine.state()
            guard.check_end(result.step, state, finished=not result.stopped)
            result.checkpoint = saver.save(result.step, state, files_of_step(run, result, guard))
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


def start_save(run: Training, guard: Guard, saver: Saver, result: TrainingResult) -> None:
    """Begin a checkpoint, unless some value of the state is not finite: then the guard wants to go back."""
    state = run.engine.state()
    if guard.is_sound(state):
        saver.start(result.step, state, files_of_step(run, result, guard))


def go_back(run: Training, guard: Guard, saver: Saver, result: TrainingResult) -> None:
    """Load the newest good checkpoint into the engine, and go on from there with later data.

    Raises MoeLmError if there is none, or the run has gone back as often as it may.
    """
    saver.wait()
    note_saves(run, saver, result)
    guard.check_rollback(result.step)
    if not Ranks().first(lambda: checkpoint.drop_doubtful(run.checkpoints), ()):
        raise guard.stop(result.step, f"{guard.trouble}, and there is no good checkpoint to go back to")
    with run.watchdog.patiently("loading"):
        counters = run.reload(result.step)
    folder = checkpoint.latest(run.checkpoints) if run.engine.topology.is_main else None
    guard.go_back(result.step, counters, folder)
    result.take(counters)
    run.log.rewind(result.step)


def files_of_step(run: Training, result: TrainingResult, guard: Guard) -> dict[str, str]:
    """The files beside the tensors, with the counters of this step."""
    files = {**run.files, "trainer.json": json_text({**result.counters(), "guard": guard.memory.model_dump()})}
    return files | ({checkpoint.DOUBTFUL: guard.trouble} if guard.trouble else {})


def note_saves(run: Training, saver: Saver, result: TrainingResult) -> None:
    """Take note of finished saves. A failed one, as on a full disk, does not end a run that has steps left."""
    for saved in saver.outcomes():
        if saved.error is None:
            result.checkpoint = saved.folder
        else:
            run.log.message(f"warning: no checkpoint at step {saved.step}: {saved.error}; training goes on")


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
