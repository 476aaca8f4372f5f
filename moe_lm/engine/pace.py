"""Which rank the others wait for: the seconds that each needs for a step, without those in which it waits."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_lm.engine.engine import Engine

WINDOW = 10  # steps whose median counts, so that one delayed by a garbage collection or a checkpoint says nothing
SLOW = 1.5  # times the seconds of the others
COSTS = 0.05  # of a step: the least delay for which a rank is named
REMIND = 10  # windows until a rank that stays slow is named again


class Pace:
    """Times how long each rank reads and runs the forward pass of a step, without the exchanges between ranks.

    The backward pass is left out, since every engine sums gradients inside it; a rank that is slow there is slow in the
    forward pass too. ZeRO 3 fetches weights inside both, so there only the reading tells the ranks apart.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._exchange = engine.exchange
        self._own: list[float] = []
        self._steps: list[float] = []
        self._silent = 0  # windows for which a slow rank is not named again
        if (exchange := engine.exchange) is not None:
            engine.loss.register_forward_pre_hook(lambda loss, _: exchange.begin_work() if loss.training else None)
            engine.loss.register_forward_hook(lambda *_: exchange.end_work())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the work of a rank before its step."""
        if self._exchange is None:
            yield
            return
        self._exchange.begin_work()
        yield
        self._exchange.end_work()

    def step(self, seconds: float) -> str | None:
        """Note a step of this many seconds, on every rank; returns a sentence if one rank keeps the others waiting."""
        if self._exchange is None:
            return None
        self._own.append(self._exchange.take_seconds())
        self._steps.append(seconds)
        if len(self._own) < WINDOW:
            return None
        mine = torch.zeros(self._engine.topology.world_size, dtype=torch.float64)
        mine[self._engine.topology.rank] = statistics.median(self._own)
        own = self._exchange.sums({"own": mine})["own"].tolist()
        said = self._judge(own, statistics.median(self._steps))
        self._own.clear()
        self._steps.clear()
        return said

    def _judge(self, own: list[float], step: float) -> str | None:
        slowest = max(range(len(own)), key=own.__getitem__)
        others = statistics.median(own[:slowest] + own[slowest + 1 :])
        self._silent -= 1
        if own[slowest] < max(SLOW * others, others + COSTS * step):
            self._silent = 0
        elif self._silent <= 0:
            self._silent = REMIND
            return (
                f"{self._engine.topology.named([slowest])} keeps the others waiting: a step needs {own[slowest]:.3g} s "
                f"of its own there, {others:.3g} s on the others; see what else runs there, its clock rate and its disk"
            )
        return None
