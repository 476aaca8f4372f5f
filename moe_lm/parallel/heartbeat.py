"""Signs of life: a thread of each rank tells the others where its main thread is, also while that one hangs."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

POLL_SECONDS = 0.1
BEAT_SECONDS = 1.0
LISTEN_SECONDS = 4.0  # without a sign in which a rank counts as gone: several beats, for a busy machine


class Place:
    """Where the main thread of a rank is: the phase of a step, and how often it has moved on.

    All ranks go through the same places, so that one that has moved on less often is behind.
    """

    def __init__(self) -> None:
        self.step: int | None = None  # counted from 1
        self.phase = "starting"
        self.moves = 0
        self._around = self.phase
        self._since = time.monotonic()

    def at(self, phase: str, step: int | None = None) -> None:
        """The main thread comes to a phase; without a step, of the same step."""
        self.phase, self.step = phase, step or self.step
        self.moves += 1
        self._since = time.monotonic()

    def begin(self, phase: str) -> None:
        """Something begins within a phase that other ranks may not need to do, and so does not count as a move."""
        self._around, self.phase, self._since = self.phase, phase, time.monotonic()

    def end(self) -> None:
        """It has ended."""
        self.phase, self._since = self._around, time.monotonic()

    @property
    def since(self) -> float:
        """The time at which it came here, which tells one stay from another."""
        return self._since

    @property
    def seconds(self) -> float:
        """Seconds since it came here."""
        return time.monotonic() - self._since

    def __str__(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


class Sign(NamedTuple):
    """A sign of life of one rank."""

    number: int  # of the signs of this rank
    place: str
    phase: str
    moves: int
    waits: bool  # its main thread is in a collective of torch


class Failure(NamedTuple):
    """Why the run ends, as the first rank that knows reports it."""

    message: str
    exit_code: int
    hung: bool = False  # somewhere: every rank shows its stacks

    @classmethod
    def of(cls, text: bytes) -> Failure:
        return cls(*json.loads(text))


class Heartbeat:
    """Writes this rank's signs into the notes that all share, and reads those of the others when it is asked to.

    The thread alone speaks through its connection: if rank 0, which may keep the notes, hangs, then so does the thread,
    but nobody who asks this object.
    """

    def __init__(self, notes: dist.Store, rank: int, world_size: int) -> None:
        """Write the first sign, before any rank listens. Raises DistError if the notes are gone."""
        self.place = Place()
        self.failure: Failure | None = None  # of any rank
        self.signs: dict[int, Sign] = {}  # the last of each rank, while this one listens
        self._notes, self._rank, self._world_size = notes, rank, world_size
        self._main = threading.get_ident()
        self._number = 0
        self._heard: dict[int, float] = {}  # when a rank's sign was seen to change
        self._listen_until = 0.0
        self._answered = time.monotonic()
        self._over = threading.Event()
        self._give_sign()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    @property
    def notes_are_gone(self) -> bool:
        """Whether whoever keeps the notes has ended."""
        return not self._thread.is_alive()

    @property
    def notes_are_lost(self) -> bool:
        """Whether whoever keeps the notes has ended, or has not answered for a while."""
        return self.notes_are_gone or time.monotonic() - self._answered > LISTEN_SECONDS

    def roll_call(self) -> list[int]:
        """Listen for some seconds, and return the ranks that gave no sign; this one too if the notes do not answer.

        It is over at once when a failure is reported or the notes are gone; ask for these first.
        """
        if self.failure is not None:  # of 512 ranks that all listen, each would read the signs of 512
            return []
        started = time.monotonic()
        self._listen_until = started + 4 * LISTEN_SECONDS

        def silent() -> list[int]:
            return [rank for rank in range(self._world_size) if self._heard.get(rank, 0.0) < started]

        def over() -> bool:
            return self.failure is not None or self.notes_are_gone or not silent()

        wait_until(over, LISTEN_SECONDS)
        if self._rank in silent():  # this thread had no turn, on a busy machine
            wait_until(lambda: over() or self._rank not in silent(), LISTEN_SECONDS)
            wait_until(over, LISTEN_SECONDS)
        self._listen_until = time.monotonic() + BEAT_SECONDS
        return silent()

    def stop(self) -> None:
        """Give no more signs. A process that ends while a thread speaks with the notes may abort."""
        self._over.set()
        self._thread.join(BEAT_SECONDS)

    def _run(self) -> None:
        with suppress(dist.DistError):
            while not self._over.wait(BEAT_SECONDS / 4 if self._listens else BEAT_SECONDS):
                self._give_sign()
                self._listen()
                if self.failure is None and self._notes.check(["failed"]):
                    self.failure = Failure.of(self._notes.get("failed"))
                    self._notes.set(f"parted/{self._rank}", "")
                self._answered = time.monotonic()

    @property
    def _listens(self) -> bool:
        return time.monotonic() < self._listen_until

    def _give_sign(self) -> None:
        self._number += 1
        place = self.place
        sign = Sign(self._number, str(place), place.phase, place.moves, _in_collective(self._main))
        self._notes.set(f"sign/{self._rank}", json.dumps(sign))

    def _listen(self) -> None:
        if not self._listens:
            self.signs = {}
            return
        found = self._notes.multi_get([f"sign/{rank}" for rank in range(self._world_size)])
        signs = {rank: Sign(*json.loads(text)) for rank, text in enumerate(found)}
        now = time.monotonic()
        for rank, sign in signs.items():
            if rank in self.signs and self.signs[rank].number != sign.number:
                self._heard[rank] = now
        self.signs = signs


def wait_until(condition: Callable[[], bool], seconds: float, poll_seconds: float = POLL_SECONDS) -> bool:
    """Poll the condition; whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_seconds)
    return True


def _in_collective(thread: int) -> bool:
    """Whether a thread is in a collective, or in a backward pass, whose collectives are not in Python."""
    frame = sys._current_frames().get(thread)
    if frame is not None and frame.f_code.co_filename.endswith(os.path.join("torch", "autograd", "graph.py")):
        return True
    collectives = os.path.join("torch", "distributed", "")
    while frame is not None:
        if collectives in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
