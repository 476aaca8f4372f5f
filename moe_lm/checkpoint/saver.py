"""The saver: writes the checkpoints of a run one after the other, at once or in a thread while training goes on."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch import Tensor

from moe_lm.checkpoint import checkpoint, retain, write
from moe_lm.checkpoint.host_memory import HostMemory
from moe_lm.checkpoint.upload import Uploader
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from moe_lm.parallel.logical import Piece
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.watch import NO_WATCHDOG, Watchdog

NICENESS = 10  # of the threads that write in the background
RETRY_SECONDS = 30  # between attempts at the last checkpoint
PATIENCE_SECONDS = 60.0  # for a save under way when training has failed: without a lost rank it may never end


class Saved(NamedTuple):
    """The outcome of a save."""

    step: int
    folder: Path | None
    error: MoeLmError | None  # why there is no folder
    given_up: tuple[str, ...] = ()  # checkpoints that made room for it on a full disk


class Saver:
    """Writes checkpoints and drops the oldest; never two at a time. Every rank has one and calls it alike.

    In the background a thread of each rank writes a copy in the host's memory. For these threads, and since a save may
    take longer than a step, the ranks speak through a process group of their own. Leave this context before the
    training's process group is destroyed.
    """

    def __init__(self, checkpoints: Path, config: CheckpointConfig, watchdog: Watchdog = NO_WATCHDOG) -> None:
        self.checkpoints, self.config, self.background = checkpoints, config, config.background
        self.watchdog = watchdog
        self.ranks = Ranks.with_own_group(watchdog.patience_seconds)
        self.uploader = None if config.upload_to is None else Uploader(checkpoints, config, self.ranks)
        self._plans = write.Plans()
        self._memory = HostMemory()
        self._under_way: tuple[int, futures.Future[Path]] | None = None
        self._outcomes: list[Saved] = []
        self._disk_was_full = False
        self._given_up: list[str] = []
        self._longest_save: float | None = None  # seconds, on this rank
        self._started = 0.0  # the save that is under way

    def save(
        self,
        step: int,
        state: Mapping[str, Tensor | Piece],
        files: Mapping[str, write.Content],
        is_over: Callable[[], bool] = lambda: True,
        tell: Callable[[str], object] = print,
    ) -> Path:
        """Write the last checkpoint, after the one that is under way.

        On a full disk older ones give way, down to the newest good one. When that does not help, or the disk fails
        otherwise, this `tell`s it and tries again every RETRY_SECONDS until `is_over` on all ranks. Then it raises
        MoeLmError, naming what is kept.
        """
        self.wait()
        while True:
            try:
                with self.watchdog.patiently("saving"):
                    return self._write(step, state, files, make_room=True)
            except write.WriteError as error:
                failure = error
            finally:
                if self._given_up:
                    tell(f"the disk is full: gave up {', '.join(self._given_up)} for the checkpoint of step {step}")
                    self._given_up = []
            if is_over():
                kept = checkpoint.latest(self.checkpoints) or "no checkpoint"
                raise MoeLmError(f"{failure}; the run ends without it, kept: {kept}", True) from failure
            tell(f"{failure}; trying again every {RETRY_SECONDS} s until it succeeds or a signal ends the run")
            self._wait_for_room(is_over)

    def start(self, step: int, state: Mapping[str, Tensor | Piece], files: Mapping[str, write.Content]) -> None:
        """Begin a save, whose outcome `outcomes` tells; in the background this returns as soon as `state` is copied."""
        self.wait()
        outcome: futures.Future[Path] = futures.Future()
        self._started = time.monotonic()
        self._under_way = step, outcome
        if self.background:
            copy = self._memory.copy(write.own_pieces(state, self.ranks))
            # A daemon: if a save never ends, the process still does.
            threading.Thread(
                target=_fulfil_behind,
                args=(outcome, lambda: self._write(step, copy, files)),
                name="checkpoint",
                daemon=True,
            ).start()
        else:
            with self.watchdog.patiently("saving"):
                _fulfil(outcome, lambda: self._write(step, state, files))

    def wait(self) -> None:
        """Wait until no save is under way. Raises its error, except a MoeLmError, which `outcomes` tells."""
        with self.watchdog.patiently("saving"):  # also when there is nothing to wait for: other ranks may have to
            self._end()

    @property
    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._under_way is not None and not self._under_way[1].done()

    @property
    def longest_save(self) -> float | None:
        """Seconds that the longest save on this rank has taken, or is taking; None before the first."""
        if not self.is_saving:
            return self._longest_save
        return max(self._longest_save or 0.0, time.monotonic() - self._started)

    @property
    def uploading(self) -> Path | None:
        """The checkpoint that is on its way to a store, and therefore not to be deleted."""
        return None if self.uploader is None else self.uploader.under_way

    def _end(self) -> None:
        if self._under_way is not None:
            (step, outcome), self._under_way = self._under_way, None
            error = outcome.exception()
            if error is not None and not isinstance(error, MoeLmError):
                raise error
            given_up, self._given_up = tuple(self._given_up), []
            self._outcomes.append(Saved(step, None if error else outcome.result(), error, given_up))

    def outcomes(self) -> list[Saved]:
        """The outcomes of the saves that have ended since the last call; raises as `wait` does."""
        if self._under_way is not None and self._under_way[1].done():
            self._end()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _write(
        self,
        step: int,
        state: Mapping[str, Tensor | Piece],
        files: Mapping[str, write.Content],
        make_room: bool = False,
    ) -> Path:
        """Save and drop the oldest. Older ones give way on a full disk at the second time, or at the first if asked."""
        self._started = time.monotonic()
        while True:
            try:
                folder = write.save(self.checkpoints, step, state, files, self.ranks, self._plans)
                break
            except write.WriteError as error:
                may_give_way = error.disk_is_full and (make_room or self._disk_was_full)
                if not may_give_way or not self._make_room():
                    self._disk_was_full = error.disk_is_full
                    raise
        self._disk_was_full = False
        if self.ranks.rank == 0:
            retain.clean(self.checkpoints, self.config, self.uploading)
        if self.uploader is not None:
            self.uploader.add(folder)
        self._longest_save = max(self._longest_save or 0.0, time.monotonic() - self._started)
        return folder

    def _wait_for_room(self, is_over: Callable[[], bool]) -> None:
        """Wait RETRY_SECONDS, or less if a signal comes."""
        for _ in range(RETRY_SECONDS):
            self.watchdog.at("saving")
            time.sleep(1)
            if is_over():
                return

    def _make_room(self) -> bool:
        gone = self.ranks.first(lambda: retain.make_room(self.checkpoints, self.config.best), ())
        self._given_up += [gone.name] if gone else []
        return gone is not None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Wait for the save under way, which is worth having even if training has failed."""
        if self._under_way is not None:
            futures.wait([self._under_way[1]], None if error is None else PATIENCE_SECONDS)
            if not self._under_way[1].done():
                return
        self.ranks.close()


def _fulfil_behind(outcome: futures.Future[Path], action: Callable[[], Path]) -> None:
    """Let what trains go before this thread, and before those that it starts, where they share cores."""
    if sys.platform == "linux":  # elsewhere threads have no niceness of their own
        with suppress(OSError):  # of a process that is nicer already
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    _fulfil(outcome, action)


def _fulfil(outcome: futures.Future[Path], action: Callable[[], Path]) -> None:
    try:
        outcome.set_result(action())
    except BaseException as error:  # the thread that asks raises it
        outcome.set_exception(error)
