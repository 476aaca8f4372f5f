"""The loop: pretraining and fine-tuning both run it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_lm.checkpoint import checkpoint, read
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
from moe_lm.train.log import RunLog


@dataclass(frozen=True)
class Training:
    """Everything that a run of the loop needs, built by `pretrain` or `finetune`."""

    engine: Engine
    batches: BatchSource
    validation: Sequence[Batch]
    config: TrainConfig
    checkpoint: CheckpointConfig
    checkpoints: Path
    log: RunLog
    files: Mapping[str, str | Path]  # kept in every checkpoint
    flops_per_token: float  # forward and backward
    evaluate_first: bool = False  # also before the first step
    watchdog: Watchdog = NO_WATCHDOG


@dataclass
class TrainingResult:
    """Where the loop ended. `stopped` when a signal ended it before the last step."""

    step: int
    stopped: bool = False
    loss: float = math.nan
    validation_loss: float | None = None  # nats a token, or a mean over the pairs
    checkpoint: Path | None = None


def train(parts: Training, start_step: int) -> TrainingResult:
    """Train from `start_step` to the last step; evaluates, saves and logs on the way.

    SIGTERM or SIGINT ends it after the running step or evaluation batch with a checkpoint, but lets the evaluation
    after the last step finish; a second signal ends the process at once.
    """
    config, engine = parts.config, parts.engine
    result = TrainingResult(step=start_step)
    pace = Pace(engine)
    with stop_signals() as signalled, Saver(parts.checkpoints, parts.checkpoint, parts.watchdog) as saver:
        if parts.evaluate_first and parts.validation and start_step == 0:
            before = evaluate(parts, signalled)
            if before is None:
                result.stopped = True
            else:
                parts.log.step({"step": 0, **before})
        while result.step < config.steps and not result.stopped:
            started = time.perf_counter()
            with pace.reading():
                micro_batches = local_micro_batches(engine, parts.batches, config, result.step)
            parts.watchdog.feed()
            step_result = engine.train_step(result.step, micro_batches)
            seconds = time.perf_counter() - started
            result.step += 1
            result.loss = step_result.loss
            record = step_record(result.step, step_result, seconds, engine, parts.flops_per_token)
            last = result.step == config.steps
            result.stopped = engine.any_rank(bool(signalled)) and not last
            if parts.validation and not result.stopped and (last or is_due(result.step, config.eval_every)):
                held_out = evaluate(parts, () if last else signalled)
                if held_out is None:
                    result.stopped = True
                    result.validation_loss = None
                else:
                    record |= held_out
                    result.validation_loss = held_out["val_loss"]
            parts.log.step(record)
            if slow := pace.step(seconds):
                parts.log.message(slow)
            if not last and not result.stopped and is_due(result.step, parts.checkpoint.every):
                saver.start(result.step, engine.state(), checkpoint_files(parts, result))
            tell_of_saves(parts, saver, result)
        if result.stopped or result.step > start_step:
            saver.wait()
            tell_of_saves(parts, saver, result)
            result.checkpoint = saver.save(result.step, engine.state(), checkpoint_files(parts, result))
    if result.stopped:
        parts.log.message(f"stopped after step {result.step}; to go on, run again: {this_command()}")
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


def evaluate(parts: Training, signalled: Sequence[int]) -> dict[str, float] | None:
    """Means over the held-out target tokens (nats) or pairs, as they stand in metrics.jsonl: `val_loss` and others.

    None when a signal came before it was done.
    """
    engine, at_once = parts.engine, parts.engine.topology.world_size
    sums: dict[str, float] = {}
    units = 0
    for start in range(0, len(parts.validation), at_once):
        if engine.any_rank(bool(signalled)):
            return None
        parts.watchdog.feed()
        found = engine.evaluate(parts.validation[start : start + at_once])
        sums = {name: sums.get(name, 0.0) + more for name, more in found.sums.items()}
        units += found.units
    return {f"val_{name}": total / max(1, units) for name, total in sums.items()}


def checkpoint_files(parts: Training, result: TrainingResult) -> dict[str, str | Path]:
    """What is kept beside the tensors."""
    counters = {"step": result.step, "loss": result.loss, "validation_loss": result.validation_loss}
    return {**parts.files, "trainer.json": json.dumps(counters)}


def tell_of_saves(parts: Training, saver: Saver, result: TrainingResult) -> None:
    """Note the checkpoints that are there. A full disk must not end a run that still has steps to do."""
    for saved in saver.outcomes():
        if saved.error is None:
            result.checkpoint = saved.folder
        else:
            parts.log.message(f"warning: no checkpoint at step {saved.step}: {saved.error}; training goes on")


def resume(engine: Engine, checkpoints: Path) -> int:
    """Load the newest complete checkpoint into the engine and return its step; 0 when there is none."""
    folder = checkpoint.latest_of_all(checkpoints)
    if folder is None:
        return 0
    state = engine.state()
    read.load(folder, state)
    engine.load_state(state)
    return int(json.loads(checkpoint.read_text(folder, "trainer.json"))["step"])


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
