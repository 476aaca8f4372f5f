"""What ends a verb from outside."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """As by Ctrl-C: nothing that was started or written stays behind. In the main thread alone."""
    handler = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def after_this() -> Iterator[None]:
    """What would end the verb waits for the end of the block: within `Popen` it leaves a process that nobody knows.

    A process that is started here inherits that, and has to take `STOP_SIGNALS` off.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
