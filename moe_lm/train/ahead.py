"""Reading ahead: a thread builds the batches of the next step while this one runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

import torch

from moe_lm.data.batches import Batch

LEAVE_SECONDS = 5.0  # that the end of a run waits for a read under way; one that hangs ends with the process


class Reading(NamedTuple):
    """The micro-batches of a step, and the seconds that building them took."""

    micro_batches: list[Batch]
    seconds: float


class Ahead:
    """What `read` gives for a step, built by one thread, at most one step ahead.

    `read` is a pure function of the step until `forget` is called. On a GPU the batches lie in pinned memory. An error
    of the thread is raised by the `take` that needs its step, and no other.
    """

    def __init__(self, read: Callable[[int], list[Batch]], device: torch.device) -> None:
        self._read, self._device = read, device
        self._asked: SimpleQueue[_Read | None] = SimpleQueue()
        self._newest: _Read | None = None
        self._thread: threading.Thread | None = None

    def take(self, step: int, last: int) -> Reading:
        """The batches of a step; those of the next are begun, unless `step` is the `last` of the run."""
        newest = self._newest
        found = newest if newest is not None and newest.step == step else self._begin(step)
        found.done.wait()
        self._newest = None
        if found.error is not None:
            raise found.error
        self._newest = self._begin(step + 1) if step < last else None
        return Reading(found.micro_batches, found.seconds)

    def forget(self) -> None:
        """Throw away what was read ahead, once nothing reads: what `read` depends on is about to change."""
        if self._newest is not None:
            self._newest.done.wait()
        self._newest = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join(LEAVE_SECONDS)

    def _begin(self, step: int) -> _Read:
        if self._thread is None:  # started here, it inherits the signals that the loop blocks
            self._thread = threading.Thread(target=self._run, name="reading ahead", daemon=True)
            self._thread.start()
        read = _Read(step)
        self._asked.put(read)
        return read

    def _run(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread begins on the first one, and pinning would open it
        while (asked := self._asked.get()) is not None:
            started = time.perf_counter()
            try:
                found = self._read(asked.step)
                asked.micro_batches = [batch.pinned() for batch in found] if self._device.type == "cuda" else found
            except BaseException as error:
                asked.error = error
            asked.seconds = time.perf_counter() - started
            asked.done.set()


class _Read:
    """A step that the thread is asked for, and what became of it."""

    def __init__(self, step: int) -> None:
        self.step, self.done = step, threading.Event()
        self.micro_batches: list[Batch] = []
        self.error: BaseException | None = None
        self.seconds = 0.0
