"""The numerical guards of a run: what it does about NaN, infinity, and a loss far outside its recent range.

Every rank has a guard and shows it figures that all ranks know, so all decide alike without a further exchange. Its
memory is part of every checkpoint, so a run that goes on decides as one that was never interrupted.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, NonNegativeInt, ValidationError
from torch import Tensor

from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import whole_file
from moe_lm.config.training import GuardConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.data.order import data_step
from moe_lm.engine.engine import StepResult
from moe_lm.parallel.logical import Piece, piece_of
from moe_lm.parallel.process_group import Ranks
from moe_lm.train.log import ROLLBACK, RunLog
from moe_lm.train.spikes import RECENT, loss_limit

LATELY = 100  # steps of which a run that ends well has taken more than half
NOTE = "rollback.json"  # in a checkpoint: what a later rollback to it decided
Window = tuple[NonNegativeInt, NonNegativeInt]  # steps whose data is left out, counted from 0: from, and up to before


class Memory(BaseModel):
    """What a guard remembers from step to step: JSON in the trainer.json of every checkpoint."""

    recent: list[float] = []  # the last accepted losses; a spike is never among them
    skipped_in_row: NonNegativeInt = 0
    outside_in_row: NonNegativeInt = 0  # steps whose loss was out of range, or not a number
    skips: list[int] = []  # the skipped ones of the last LATELY steps
    skipped: NonNegativeInt = 0  # in all
    spikes: NonNegativeInt = 0  # in all
    rollbacks: NonNegativeInt = 0
    windows: list[Window] = []
    owes_save: bool = False  # a checkpoint was due in trouble, and is written when that is over


class Guard:
    """Judges every step, and says when the run must go back to its newest good checkpoint.

    `counters` is the trainer.json of the checkpoint that the run goes on from; older ones have no memory of a guard.
    """

    def __init__(self, config: GuardConfig, log: RunLog, counters: Mapping[str, Any]) -> None:
        self.config, self.log = config, log
        self._limit = math.inf
        self._not_finite = ""  # the name of a tensor that is not
        self._sound_step = 0  # after which every value was last known to be finite
        self._remember(counters)

    def judge(self, step: int, result: StepResult) -> None:
        """Note a finished step, counted from 1; a skip and a spike are events."""
        memory = self.memory
        outside = not result.loss <= self._limit  # NaN too
        memory.outside_in_row = memory.outside_in_row + 1 if outside else 0
        memory.skipped_in_row = memory.skipped_in_row + 1 if result.skipped else 0
        if memory.skips:
            memory.skips = [skip for skip in memory.skips if skip > step - LATELY]
        if result.skipped:
            memory.skips.append(step)
            memory.skipped += 1
            self._say_skip(step, result)
        elif outside:
            memory.spikes += 1
            self._say_spike(step, result)
        else:
            memory.recent = [*memory.recent[1 - RECENT :], result.loss]
            self._limit = loss_limit(memory.recent, self.config.spike_threshold)

    @property
    def loss_limit(self) -> float:
        """The loss above which the next step is not to be taken."""
        return self._limit if self.config.on_spike == "skip" else math.inf

    @property
    def trouble(self) -> str:
        """What is wrong at the moment; empty when the last step was taken with a loss in its range."""
        if self._not_finite:
            return f"{self._not_finite} is not finite"
        if count := self.memory.skipped_in_row:
            return "the last step was skipped" if count == 1 else f"{count} steps in a row were skipped"
        if count := self.memory.outside_in_row:
            return f"the loss has been far outside its recent range for {count} step{'s' * (count > 1)}"
        return ""

    def may_save(self, is_due: bool) -> bool:
        """Whether to write a checkpoint now: not in trouble, so that the good ones stay, but as soon as it is over."""
        is_due = is_due or self.memory.owes_save
        self.memory.owes_save = is_due and bool(self.trouble)
        return is_due and not self.trouble

    @property
    def must_go_back(self) -> bool:
        """Whether training on from here is hopeless."""
        memory, config = self.memory, self.config
        return (
            bool(self._not_finite)
            or memory.skipped_in_row >= config.max_skipped
            or memory.outside_in_row >= config.max_spike_steps
        )

    def is_sound(self, step: int, state: Mapping[str, Tensor | Piece]) -> bool:
        """Whether every value of the state after a step is finite on all ranks; all call this. If not, go back."""
        self._not_finite = first_not_finite(state)
        self._sound_step = self._sound_step if self._not_finite else step
        return not self._not_finite

    # Going back

    def check_rollback(self, step: int) -> None:
        """Raise MoeLmError if the run has gone back as often as it may."""
        if self.memory.rollbacks >= self.config.max_rollbacks:
            times = f"after {self.memory.rollbacks} rollbacks (train.guards.max_rollbacks)"
            times = times if self.config.max_rollbacks else "and train.guards.max_rollbacks=0"
            raise self.give_up_error(step, f"{self.trouble}, {times}")

    def go_back(self, step: int, counters: Mapping[str, Any], folder: Path | None) -> None:
        """From `step` to the checkpoint that was loaded; the data that was trained on since is left out from now on.

        `folder` is the checkpoint on the rank that writes, else None.
        """
        reason, rollbacks, target = self.trouble, self.memory.rollbacks + 1, int(counters["step"])
        window = self._data_step(target), self._data_step(step - 1) + 1
        apart = [other for other in self.memory.windows if other[1] <= window[0] or other[0] >= window[1]]
        decided = {"rollbacks": rollbacks, "windows": sorted([*apart, window])}
        self._remember({"step": target, "guard": {**counters.get("guard", {}), **decided}})
        self.log.event(
            ROLLBACK,
            step,
            f"back from step {step} to step {target}: {reason}; the data of steps {window[0] + 1} to {window[1]} is "
            f"left out from now on (rollback {rollbacks} of at most {self.config.max_rollbacks})",
            reason=reason, to=target, window=window, rollbacks=rollbacks,
        )  # fmt: skip
        if folder is not None:
            try:
                with whole_file(folder / NOTE) as file:
                    file.write_text(json.dumps(decided), encoding="utf-8")
            except OSError as error:  # if the run is killed before it saves, it fails and goes back once more
                self.log.message(f"warning: {folder / NOTE} could not be written: {error}; training goes on")

    def give_up_error(self, step: int, why: str) -> MoeLmError:
        """The error to raise that ends the run; also an event. It names the data that may be to blame."""
        in_row = max(1, self.memory.skipped_in_row, self.memory.outside_in_row)
        sound_step = self._sound_step if self._not_finite else step - in_row
        first, last = self._data_step(sound_step) + 1, self._data_step(step - 1) + 1
        text = (
            f"stopped at step {step}: {why}; lower train.optimizer.lr or lengthen train.schedule.warmup_steps, look at "
            f"the data of step {first}{f' to {last}' if last > first else ''}, and run again"
        )
        self.log.event("gave_up", step, text, show=False, reason=why)
        return MoeLmError(text, common=True)

    # The end

    def check_end(self, step: int, state: Mapping[str, Tensor | Piece], finished: bool) -> None:
        """Raise MoeLmError if the state must not be saved: it is not finite, or hardly a step led to it."""
        if not self.is_sound(step, state):
            raise self.give_up_error(step, f"{self.trouble}, so nothing was saved")
        lately, skipped = min(step, LATELY), len(self.memory.skips)
        if finished and 2 * skipped >= lately:
            raise self.give_up_error(step, f"{skipped} of the last {lately} steps were skipped, so nothing was saved")
        if self.trouble:
            self.log.event(
                "doubtful",
                step,
                f"step {step} is saved although {self.trouble}; a rollback passes this checkpoint over, and no older "
                "one is deleted for it",
                reason=self.trouble,
            )

    def batches(self, source: BatchSource) -> BatchSource:
        """The batches of a source without the data that rollbacks left out."""
        return _LeftOut(source, self)

    def _remember(self, counters: Mapping[str, Any]) -> None:
        try:
            self.memory = Memory.model_validate(counters.get("guard", {}))
        except ValidationError as error:
            raise MoeLmError(
                f"the checkpoint's trainer.json has no sound memory of the guards: {error.errors()[0]['msg']}; copy "
                "the checkpoint again"
            ) from error
        self._limit = loss_limit(self.memory.recent, self.config.spike_threshold)
        self._not_finite, self._sound_step = "", int(counters.get("step", 0))

    def _data_step(self, step: int) -> int:
        return data_step(step, self.memory.windows)

    def _say_skip(self, step: int, result: StepResult) -> None:
        if not math.isfinite(result.loss):
            cause, figure = "loss", f"its loss is {result.loss}"
        elif result.loss > self.loss_limit:
            cause, figure = "spike", f"its loss is {self._far(result.loss)}"
        else:
            cause, figure = "gradient", f"its loss is {result.loss:.4g}, but the gradient's norm is not finite"
        in_row = self.memory.skipped_in_row
        text = f"step {step} was skipped: {figure}" + (f"; {in_row} in a row" if in_row > 1 else "")
        self._say("skip", step, text, self.memory.skipped, result, cause=cause, in_row=in_row)

    def _say_spike(self, step: int, result: StepResult) -> None:
        text = f"step {step}: the loss is {self._far(result.loss)}; the step was taken (train.guards.on_spike=log)"
        self._say("spike", step, text, self.memory.spikes, result, in_row=self.memory.outside_in_row)

    def _far(self, loss: float) -> str:
        median = statistics.median(self.memory.recent)
        return f"{loss:.4g}, far outside its recent range (median {median:.4g}, limit {self._limit:.4g})"

    def _say(self, kind: str, step: int, text: str, count: int, result: StepResult, **fields: Any) -> None:
        """Every one is an event; a person is shown the first ten, then the 20th, the 30th ... the 100th, the 200th."""
        figures = {"loss": result.loss, "grad_norm": result.grad_norm, "data_step": self._data_step(step - 1) + 1}
        self.log.event(kind, step, text, show=float(f"{count:.0e}") == count, **figures, **fields)


class _LeftOut:
    """The batches of a source without the data that rollbacks left out."""

    def __init__(self, source: BatchSource, guard: Guard) -> None:
        self._source, self._guard = source, guard

    @property
    def fingerprint(self) -> str:
        return self._source.fingerprint

    def batch(self, step: int, rows: range) -> Batch:
        return self._source.batch(self._guard._data_step(step), rows)


def first_not_finite(state: Mapping[str, Tensor | Piece]) -> str:
    """The name of a tensor that has a value which is not finite on some rank, or nothing; every rank calls this."""
    named = ((name, view) for name, tensor in state.items() for view in piece_of(tensor).views)
    mine = next((name for name, view in named if not _is_finite(view)), "")
    return next(filter(None, Ranks().each(lambda: mine, ())), "")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    bounds = torch.stack(tensor.aminmax())  # NaN passes through; many times as fast as a mask of all values
    return bool(bounds.isfinite().all())


def with_note(folder: Path, counters: dict[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint with what a later rollback to it decided; every rank calls this."""
    decided = Ranks().first(lambda: _read_note(folder), ())
    return {**counters, "guard": {**counters.get("guard", {}), **decided}} if decided else counters


def _read_note(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return {name: found[name] for name in ("rollbacks", "windows")}
    except (OSError, ValueError, KeyError, TypeError):  # none; or damaged: the run fails and goes back once more
        return {}


def with_new_settings(counters: Mapping[str, Any]) -> dict[str, Any]:
    """The counters for a run that goes on with other settings: the windows of data alone are kept."""
    return {**counters, "guard": {"windows": counters.get("guard", {}).get("windows", [])}}
