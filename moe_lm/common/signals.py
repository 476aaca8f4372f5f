"""The signals that end a verb: SIGTERM, and SIGINT from Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_signals() -> Iterator[Sequence[int]]:
    """Yield a list that receives SIGTERM and SIGINT in place of the process; a second signal ends it at once.

    A thread reads them, whatever the main thread waits for. The main thread blocks them, and the processes it starts
    inherit that: Ctrl-C reaches every process of a terminal, and would kill the compilers of `torch.compile`.
    """
    received: list[int] = []
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] not in STOP_SIGNALS:
                continue  # the pipe reports every signal that Python handles
            if received:
                os._exit(128 + number[0])
            received.append(number[0])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield received
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the verb as Ctrl-C does, by an exception that cleans up; in the main thread only."""
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def after_this() -> Iterator[None]:
    """Hold both signals back until the block ends: within `Popen` they would orphan the process that it starts.

    That process inherits the blocked signals and has to unblock `STOP_SIGNALS` itself.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
