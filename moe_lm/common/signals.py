"""The signals that stop the program, heard from its first import to its last write.

SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (a scheduler's warning ahead of a time limit) and SIGHUP (the terminal was closed)
mean the same: save what there is to save, and stop. A thread reads them, whatever the main thread waits for. What was
ignored when the program began stays ignored: SIGHUP under `nohup`, SIGINT in what a script starts in the background.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from moe_lm.common.exits import STOPPED, exit_code

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
MAY_BE_IGNORED, IGNORED = (signal.SIGINT, signal.SIGHUP), signal.SIG_IGN
SAME_EVENT_SECONDS = 0.5  # timeout(1), a terminal and its shell, or a launcher and its group send a signal twice
PATIENCE_SECONDS = 2.0  # that a verb has to hear a signal, unless it is within an import or a long call of a library
AGAIN_SECONDS = 0.1  # until it is told again
NOTHING_TO_SAVE = "stopped before the first step; nothing to save"
# In place of a signal, in the pipe to the thread of `ended_at_once`, which hears them in order with the signals: all
# is saved, or an error is on its way to the user.
OVER, BROKEN = 0, 255


_ending: int | None = None  # the pipe to the thread of `ended_at_once`, within its block


class Interrupted(SystemExit):
    """A verb that a signal ends, after the user was told."""


class StopSignals(list[int]):
    """The stop signals that came, in order."""

    deferred = False

    def defer(self) -> None:
        """From now on there is something to save, so that a signal no longer ends the process at once."""
        self.deferred = True

    @property
    def cause(self) -> str:
        """What to tell the user about the first one: `SIGTERM`."""
        if not self:
            return "a signal to another rank"
        name = signal.Signals(self[0]).name
        return f"{name}, the terminal was closed" if self[0] == signal.SIGHUP else name


def unignored() -> list[signal.Signals]:
    """The stop signals but those that were ignored when the program began, and may be."""
    return [number for number in STOP_SIGNALS if number not in MAY_BE_IGNORED or signal.getsignal(number) != IGNORED]


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Yield a list that receives the stop signals in place of the process; a second signal ends it at once.

    Under `ended_at_once`, the first one does so too until `defer()` is called. The main thread blocks the signals, and
    the processes it starts inherit that: Ctrl-C reaches every process of a terminal, and would kill the compilers of
    `torch.compile`.
    """
    received, again, outer = StopSignals(), _SecondSignal(), _ending

    def receive(number: int) -> None:
        if outer is not None and not received.deferred:
            os.write(outer, bytes([number]))
        elif again(number):
            os._exit(128 + number)
        else:
            received.append(number)

    with _heard(_noted, receive):
        mask, end = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS), BROKEN
        try:
            yield received
            end = OVER
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if outer is not None:
                os.write(outer, bytes([end]))


@contextmanager
def ended_at_once() -> Iterator[None]:
    """End the process with exit code 75 when a stop signal comes, for as long as nothing would be lost."""
    global _ending
    end = None

    def receive(number: int) -> None:
        nonlocal end
        if number in (OVER, BROKEN):
            end = number
            return
        if end == BROKEN:
            os._exit(128 + number)
        if _first_rank():
            _say("stopped after the last save" if end == OVER else NOTHING_TO_SAVE)
        os._exit(exit_code(STOPPED))

    with _heard(_noted, receive) as _ending:
        try:
            yield
        finally:
            _ending = None


@contextmanager
def ended_by_exception(goes_on: bool = False) -> Iterator[None]:
    """Let a stop signal end the verb by an exception, so that it cleans up; a second one ends it at once.

    The exit code is 128 and the signal's number; 75 for a verb that `goes_on` when it is started again. An import is
    finished first: some swallow an exception, and leave half a module behind.
    """
    heard, again, main, told, within_import = threading.Event(), _SecondSignal(), threading.get_ident(), 0.0, 0

    def code(number: int) -> int:
        return STOPPED if goes_on else 128 + number

    def say(number: int) -> None:
        _say(f"interrupted by {signal.Signals(number).name}{'; the same command goes on' if goes_on else ''}")

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal within_import
        if heard.is_set():
            return
        if _imports(frame):
            within_import = number
            return
        heard.set()
        say(number)
        raise Interrupted(code(number))

    def receive(number: int) -> None:
        nonlocal told
        if signal.getsignal(number) is not leave or time.monotonic() - told < AGAIN_SECONDS:
            return  # the verb listens itself, or it is our own
        if again(number):
            os._exit(128 + number)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not heard.wait(AGAIN_SECONDS):
            if time.monotonic() > deadline:
                say(number)
                os._exit(code(number))
            told = time.monotonic()
            signal.pthread_kill(main, number)

    with _heard(leave, receive):
        try:
            yield
        finally:
            if within_import:  # and the verb was over before it was told again
                leave(within_import, None)


@contextmanager
def calling_on_stop(stop: Callable[[int], object], leave: Callable[[int], object]) -> Iterator[None]:
    """Call `stop` when a stop signal comes; `leave` with the exit code at a second one."""
    again = _SecondSignal()

    def receive(number: int) -> None:
        if again(number):
            leave(128 + number)
        else:
            stop(number)

    with _heard(_noted, receive):
        yield


@contextmanager
def ctrl_c_as_exception() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, for a verb in which it ends less than the program."""
    before = signal.getsignal(signal.SIGINT)
    if before != IGNORED:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def after_this() -> Iterator[None]:
    """Hold the signals back until the block ends: within `Popen` they would orphan the process that it starts.

    That process inherits the blocked signals and has to unblock `STOP_SIGNALS` itself.
    """
    came: list[int] = []  # the mask is the main thread's only; another thread may take the signal for it
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in unignored()}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


Handler = Callable[[int, FrameType | None], object]


@contextmanager
def _heard(handler: Handler, receive: Callable[[int], None]) -> Iterator[int]:
    """Install the handler, and call `receive` on a thread; yields the pipe to that thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in (*STOP_SIGNALS, OVER, BROKEN):  # the pipe reports every signal that Python handles
                receive(number[0])

    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    watcher.start()
    before = {number: signal.signal(number, handler) for number in unignored()}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield writer
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, old in before.items():
            signal.signal(number, old)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _noted(number: int, frame: FrameType | None) -> None:
    """The handler where the thread does all."""


def _first_rank() -> bool:
    """Whether this process speaks for its run, as far as the environment tells before the ranks meet."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


class _SecondSignal:
    """Tells a second signal from the first one that came twice."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int) -> bool:
        if self._first is None:
            self._first = time.monotonic()
            return False
        return number != signal.SIGHUP and time.monotonic() - self._first > SAME_EVENT_SECONDS


def _say(text: str) -> None:
    """Write a line to stderr, also from within a handler; the terminal may be gone."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
