"""The saver: writes the checkpoints of a run one after the other, at once or in a thread while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from moe_lm.checkpoint import checkpoint, write
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.watch import NO_WATCHDOG, Watchdog

PATIENCE_SECONDS = 60.0  # for a save under way when training has failed: without a lost rank it may never end


class Saved(NamedTuple):
    """The outcome of a save."""

    step: int
    folder: Path | None
    error: MoeLmError | None  # why there is no folder


class Saver:
    """Writes checkpoints and drops the oldest; never two at a time. Every rank has one and calls it alike.

    In the background a thread of each rank writes a copy in the host's memory. For these threads, and since a save may
    take longer than a step, the ranks speak through a process group of their own. Leave this context before the
    training's process group is destroyed.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig, watchdog: Watchdog = NO_WATCHDOG) -> None:
        self.checkpoints, self.keep, self.background = checkpoints, config.keep, config.background
        self.watchdog = watchdog
        self.ranks = Ranks.with_own_group(watchdog.patience_seconds)
        self._under_way: tuple[int, futures.Future[Path]] | None = None
        self._outcomes: list[Saved] = []

    def save(self, step: int, state: Mapping[str, Tensor], files: Mapping[str, str | Path]) -> Path:
        """Write a checkpoint, after the one that is under way. Raises MoeLmError when that cannot be done."""
        self.wait()
        with self.watchdog.patiently("saving"):
            return self._write(step, state, files)

    def start(self, step: int, state: Mapping[str, Tensor], files: Mapping[str, str | Path]) -> None:
        """Begin a save, whose outcome `outcomes` tells; in the background this returns as soon as `state` is copied."""
        self.wait()
        outcome: futures.Future[Path] = futures.Future()
        self._under_way = step, outcome
        if self.background:
            copy = write.snapshot(state)
            # A daemon: if a save never ends, the process still does.
            threading.Thread(
                target=_fulfil, args=(outcome, lambda: self._write(step, copy, files)), name="checkpoint", daemon=True
            ).start()
        else:
            with self.watchdog.patiently("saving"):
                _fulfil(outcome, lambda: self._write(step, state, files))

    def wait(self) -> None:
        """Wait until no save is under way. Raises its error, except a MoeLmError, which `outcomes` tells."""
        if self._under_way is not None:
            (step, outcome), self._under_way = self._under_way, None
            with self.watchdog.patiently("saving"):
                error = outcome.exception()
            if error is not None and not isinstance(error, MoeLmError):
                raise error
            self._outcomes.append(Saved(step, None if error else outcome.result(), error))

    def outcomes(self) -> list[Saved]:
        """The outcomes of the saves that have ended since the last call; raises as `wait` does."""
        if self._under_way is not None and self._under_way[1].done():
            self.wait()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _write(self, step: int, state: Mapping[str, Tensor], files: Mapping[str, str | Path]) -> Path:
        folder = write.save(self.checkpoints, step, state, files, self.ranks)
        if self.ranks.rank == 0:
            checkpoint.clean(self.checkpoints, self.keep)
        return folder

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the save under way, which is worth having even if training has failed."""
        if self._under_way is not None:
            futures.wait([self._under_way[1]], None if error is None else PATIENCE_SECONDS)
            if not self._under_way[1].done():
                return
        self.ranks.close()


def _fulfil(outcome: futures.Future[Path], action: Callable[[], Path]) -> None:
    try:
        outcome.set_result(action())
    except BaseException as error:  # the thread that asks raises it
        outcome.set_exception(error)
