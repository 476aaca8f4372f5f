"""Which rank the others wait for: the seconds that each needs for a step, without those in which it waits."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from moe_lm.engine.engine import Engine
from moe_lm.parallel.topology import Topology

WINDOW = 10  # steps whose mean counts
INTERVAL = 5  # steps between two comparisons; a rank is named when it is the slow one in two of them in a row
SLOW = 1.5  # times the seconds of the others
COSTS = 0.05  # of a step: the least delay for which a rank is named
REMIND = 20  # comparisons until a rank that stays slow is named again


class SlowRank(NamedTuple):
    """A rank that keeps the others waiting, with the seconds of its own work in a step and the median of the others."""

    name: str
    rank: int
    seconds: float
    others_seconds: float
    data_seconds: float = 0.0  # of `seconds`, those in which it waits for its batch

    @property
    def text(self) -> str:
        return (
            f"{self.name} keeps the others waiting: a step needs {self.seconds:.3g} s of its own there, "
            f"{self.data_seconds:.3g} s of them to wait for its data, and {self.others_seconds:.3g} s on the others; "
            "see what else runs there, its clock rate and its disk"
        )


class Pace:
    """Times how long each rank reads and runs the forward pass of a step, without the exchanges between ranks.

    The backward pass is left out, since every engine sums gradients inside it; a rank that is slow there is slow in the
    forward pass too. ZeRO 3 fetches weights inside both, so there only the reading tells the ranks apart.
    """

    def __init__(self, engine: Engine) -> None:
        self._exchange = engine.exchange
        self._comparison = Comparison(engine.topology)
        self._own: deque[float] = deque(maxlen=WINDOW)
        self._reading: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._num_steps = 0
        if engine.exchange is not None:
            engine.loss.register_forward_pre_hook(self._begin_forward)
            engine.loss.register_forward_hook(self._end_forward)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the work of a rank before its step."""
        if self._exchange is None:
            yield
            return
        self._exchange.begin_work()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._reading.append(time.perf_counter() - started)
            self._exchange.end_work()

    def step(self, seconds: float) -> SlowRank | None:
        """Note a step of this many seconds, on every rank; returns the rank that keeps the others waiting."""
        if self._exchange is None:
            return None
        self._own.append(self._exchange.take_seconds())
        self._steps.append(seconds)
        self._num_steps += 1
        if self._num_steps < WINDOW or self._num_steps % INTERVAL:
            return None
        own, reading = self._exchange.gather(typical(self._own), typical(self._reading))
        slow = self._comparison.slow_rank(own, typical(self._steps))
        return slow and slow._replace(data_seconds=reading[slow.rank])

    def _begin_forward(self, loss: nn.Module, *_: object) -> None:
        if self._exchange is not None and loss.training:
            self._exchange.place.at("forward")
            self._exchange.begin_work()

    def _end_forward(self, loss: nn.Module, *_: object) -> None:
        if self._exchange is not None and loss.training:
            self._exchange.end_work()
            self._exchange.place.at("backward")


class Comparison:
    """Tells which rank is slow; one that stays slow is told again after a while."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._suspect: int | None = None
        self._silent = 0  # comparisons for which no rank is named again

    def slow_rank(self, own: Sequence[float], step: float) -> SlowRank | None:
        """The slow rank, if there is one, from the seconds of each rank's own work in a step, and of a whole step."""
        slowest = max(range(len(own)), key=own.__getitem__)
        others = statistics.median([*own[:slowest], *own[slowest + 1 :]])
        is_slow = own[slowest] >= max(SLOW * others, others + COSTS * step)
        # Once may be a burst of something else on the machine.
        again, self._suspect = is_slow and slowest == self._suspect, slowest if is_slow else None
        self._silent = max(0, self._silent - 1) if is_slow else 0
        if not again or self._silent:
            return None
        self._silent = REMIND
        return SlowRank(self._topology.named([slowest]), slowest, own[slowest], others)


def typical(seconds: Sequence[float]) -> float:
    """The mean without the longest, which may have been delayed by a garbage collection or a slow read.

    Not the median: a rank whose processor is taken away in turns has long steps between short ones.
    """
    return statistics.fmean(sorted(seconds)[:-1])
