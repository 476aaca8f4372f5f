"""The checkpoints of a run: the one it goes on from, those it writes, and the one it goes back to in trouble."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, retain
from moe_lm.checkpoint.recovery import Found, newest_sound
from moe_lm.checkpoint.saver import Saver
from moe_lm.checkpoint.write import Content
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from moe_lm.engine.engine import LOAD, Engine
from moe_lm.parallel.logical import Piece
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.watch import NO_WATCHDOG, Watchdog
from moe_lm.train.guards import with_note
from moe_lm.train.log import RunLog

MEASURED_LATER = "measured_later"  # among the counters: the held-out loss of a step that was saved before


class Checkpoints:
    """Writes, loads and deletes the checkpoints of a run. Every rank has one and calls it alike.

    `files` go beside the tensors of every checkpoint, by name. `keep_lock` is called before each save, and raises
    MoeLmError if another run writes here. A context: saves may go on in the background within it.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        engine: Engine,
        log: RunLog,
        files: Mapping[str, Content],
        keep_lock: Callable[[], object] = lambda: None,
        watchdog: Watchdog = NO_WATCHDOG,
    ) -> None:
        self.folder, self.config = folder, config
        self._engine, self._log, self._files = engine, log, files
        self._keep_lock, self._watchdog = keep_lock, watchdog
        self._upload_error: str | None = None  # of the last upload

    def start(self, step: int, state: Mapping[str, Tensor | Piece], files: Mapping[str, str]) -> None:
        """Begin to write the state after a step; `note_saves` says how it went."""
        self._keep_lock()
        self._saver.start(step, state, {**self._files, **files})

    def save(
        self, step: int, state: Mapping[str, Tensor | Piece], files: Mapping[str, str], is_over: Callable[[], bool]
    ) -> Path:
        """Write the last checkpoint; on a full disk, try again until `is_over`, and then raise MoeLmError."""
        self._keep_lock()
        folder = self._saver.save(
            step,
            state,
            {**self._files, **files},
            is_over=is_over,
            tell=lambda text: self._log.event("full_disk", step, f"warning: {text}"),
        )
        self._note_save(step)
        return folder

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way in the background."""
        return self._saver.is_saving

    @property
    def longest_save(self) -> float | None:
        """Seconds that the longest save of this process has taken so far; None before the first."""
        return self._saver.longest_save

    def wait(self, step: int) -> None:
        """Wait until no save is under way, and note its outcome."""
        self._saver.wait()
        self.note_saves(step)

    def note_saves(self, step: int) -> None:
        """Log what finished saves met with. A failed one, as on a full disk, does not end a run with steps left."""
        for saved_step, folder, error, given_up in self._saver.outcomes():
            if folder is not None:
                self._note_save(saved_step)
            if given_up:
                text = (
                    f"warning: the disk is full: gave up {', '.join(given_up)} for the checkpoint of step {saved_step}"
                )
                self._log.event("full_disk", step, text)
            if error is not None:
                text = f"warning: no checkpoint at step {saved_step}: {error}; training goes on"
                self._log.event("failed_save", saved_step, text)

        self._note_uploads()

    def _note_uploads(self) -> None:
        for step, error in () if self._saver.uploader is None else self._saver.uploader.outcomes():
            self._upload_error = error
            if error is None:
                self._log.event("upload", step, f"uploaded step {step} to {self.config.upload_to}", show=False)
            else:
                text = f"warning: {self.config.upload_to} does not have the run as of step {step}: {error}"
                self._log.event("failed_upload", step, text)

    def _note_save(self, step: int) -> None:
        self._log.event("save", step, f"saved step {step}", show=False)

    def go_back(self, step: int) -> dict[str, Any] | None:
        """Load the newest good checkpoint and return its trainer.json; None if there is none.

        Later ones, which are doubtful, are deleted then. Damage that is found is logged as of `step`.
        """
        with self._watchdog.patiently("loading"):
            found = newest_sound(self.folder, self.config.on_damage, good=True)
            if found.folder is None:
                return None
            counters = load(self._engine, found.folder)
            report_damage(self._log, found, step)
            if self._engine.topology.is_main:
                retain.drop_after(self.folder, counters["step"])
            if self._saver.uploader is not None:
                self._saver.uploader.go_back_to(counters["step"])
            return counters

    @property
    def newest(self) -> Path | None:
        """The newest complete checkpoint, on the rank that writes; None on the others."""
        return checkpoint.latest(self.folder) if self._engine.topology.is_main else None

    def note_held_out_loss(self, loss: float) -> None:
        """Keep beside the newest checkpoint a loss that was measured after it was saved."""
        if (folder := self.newest) is not None:
            retain.note_held_out_loss(folder, loss)
            if self._saver.uploader is not None:
                self._saver.uploader.add(folder)

    def clean(self) -> None:
        """Delete what is not to be kept."""
        if self._engine.topology.is_main:
            retain.clean(self.folder, self.config, self._saver.uploading)

    def __enter__(self) -> Self:
        self._saver = Saver(self.folder, self.config, self._watchdog)
        if self._saver.uploader is not None and (newest := checkpoint.latest(self.folder)) is not None:
            self._saver.uploader.add(newest)  # unless the store has it, as after an upload that was cut
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None and self._saver.uploader is not None:
            self._saver.wait()
            self._saver.uploader.finish(self._log.message, self._watchdog)
            self._note_uploads()
            if self._upload_error is None and (newest := self.newest) is not None:
                self._log.message(f"the last checkpoint, {newest.name}, is in {self.config.upload_to}")
        self._saver.__exit__(kind, error, at)


def load(engine: Engine, folder: Path | None) -> dict[str, Any]:
    """Load a checkpoint, verified before, into the engine and return its trainer.json; empty without one."""
    if folder is None:
        return {}
    state = engine.state()
    read.load(folder, state, verified=True, zero_if_absent=(LOAD,))
    engine.load_state(state)
    return with_note(folder, read_counters(folder))


def read_counters(folder: Path) -> dict[str, Any]:
    """The trainer.json of a checkpoint. Raises MoeLmError unless it is of the folder's step."""
    try:
        counters = json.loads(checkpoint.read_text(folder, "trainer.json"))
        step = int(counters["step"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, MoeLmError):
            raise
        raise MoeLmError(f"{folder}/trainer.json does not say how many steps were done; copy it again") from error
    if step != checkpoint.step_of(folder):
        raise MoeLmError(f"{folder}/trainer.json is of step {step}; expected the folder's; copy the checkpoint again")
    return {**counters, "step": step, MEASURED_LATER: Ranks().first(lambda: retain.noted(folder), ())}


def report_damage(log: RunLog, found: Found, step: int) -> None:
    """An event for every damaged checkpoint that was passed over."""
    for name, text in found.lines.items():
        log.event("damaged_checkpoint", step, f"warning: {text}", checkpoint=name, damage=found.damaged[name])
