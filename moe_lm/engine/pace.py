"""Which rank the others wait for: what each one needs for a step by itself, without what it waits for others."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_lm.engine.engine import Engine

WINDOW = 10  # steps, of which the median counts: one that a garbage collection or a checkpoint delays says nothing
SLOW = 1.5  # times what the others need
COSTS = 0.05  # of a step: the least that a rank must cost all others to be named
REMIND = 10  # windows until a rank that stays slow is named again


class Pace:
    """Times reading and the forward pass of every step, without the exchanges between ranks.

    The backward pass is left out, since every engine sums gradients inside it; a rank that is slow there is slow in the
    forward pass too. ZeRO 3 fetches weights inside both, so that there a rank is known only by its reading.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._exchange = engine.exchange
        self._own: list[float] = []
        self._steps: list[float] = []
        self._silent = 0  # windows for which a slow rank is not named again
        if self._exchange is not None:
            engine.loss.register_forward_pre_hook(lambda *_: self._begin_forward())
            engine.loss.register_forward_hook(lambda *_: self._end_forward())

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what a rank does for itself before its step."""
        if self._exchange is None:
            yield
            return
        self._exchange.begin_work()
        yield
        self._exchange.end_work()

    def step(self, seconds: float) -> str | None:
        """After a step of this many seconds; every rank calls it. A sentence when one keeps the others waiting."""
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

    def _begin_forward(self) -> None:
        if self._exchange is not None and self._engine.loss.training:
            self._exchange.begin_work()

    def _end_forward(self) -> None:
        if self._exchange is not None:
            self._exchange.end_work()
