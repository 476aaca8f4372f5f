"""Which rank the others wait for: what each one needs for a step by itself, without what it waits for others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_lm.engine.engine import Engine
from moe_lm.parallel.expert_parallel import AllToAllDispatcher
from moe_lm.parallel.process_group import all_reduce_sum

WINDOW = 10  # steps, of which the median counts: one that a garbage collection or a checkpoint delays says nothing
SLOW = 1.5  # times what the others need
COSTS = 0.05  # of a step: the least that a rank must cost all others to be named
REMIND = 10  # windows until a rank that stays slow is named again

Mark = float | torch.cuda.Event


class Pace:
    """Times reading and the forward pass of every step, without the exchanges between ranks.

    The backward pass is left out, since every engine sums gradients inside it; a rank that is slow there is slow in the
    forward pass too. ZeRO 3 fetches weights inside both, so that there a rank is known by its reading alone.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._alone = engine.topology.world_size == 1
        self._spans: list[tuple[Mark, Mark, int]] = []  # of this step; 1 counts, -1 is waiting within one that counts
        self._forward: Mark | None = None
        self._own: list[float] = []
        self._steps: list[float] = []
        self._silent = 0  # windows for which a slow rank is not named again
        if not self._alone:
            engine.loss.register_forward_pre_hook(lambda *_: self._begin())
            engine.loss.register_forward_hook(lambda *_: self._end())
            engine.loss.all_reduce = self._all_reduce
            for layer in engine.model.moe_layers:
                if isinstance(layer.dispatcher, AllToAllDispatcher):
                    layer.dispatcher.waiting = self._waiting

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what a rank does for itself before its step."""
        started = self._mark()
        yield
        self._spans.append((started, self._mark(), 1))

    def step(self, seconds: float) -> str | None:
        """After a step of so many seconds; every rank calls it. A sentence when one keeps the others waiting."""
        if self._alone:
            return None
        self._own.append(sum(sign * self._seconds(begin, end) for begin, end, sign in self._spans))
        self._steps.append(seconds)
        self._spans.clear()
        if len(self._own) < WINDOW:
            return None
        mine = torch.zeros(self._engine.topology.world_size, dtype=torch.float64)
        mine[self._engine.topology.rank] = statistics.median(self._own)
        own = all_reduce_sum(mine.to(self._engine.device)).tolist()
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
                "of its own there, "
                f"{others:.3g} s on the others; see what else runs there, its clock rate and its disk"
            )
        return None

    def _begin(self) -> None:
        if self._engine.loss.training:
            self._forward = self._mark()

    def _end(self) -> None:
        if self._forward is not None:
            self._spans.append((self._forward, self._mark(), 1))
        self._forward = None

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        # Activation checkpointing runs the forward pass again within the backward pass, which is not timed.
        if self._forward is None:
            yield
            return
        started = self._mark()
        yield
        self._spans.append((started, self._mark(), -1))

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        with self._waiting():
            return all_reduce_sum(tensor)

    def _mark(self) -> Mark:
        if self._engine.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Mark, end: Mark) -> float:
        if isinstance(begin, float) and isinstance(end, float):
            return end - begin
        assert isinstance(begin, torch.cuda.Event)
        assert isinstance(end, torch.cuda.Event)
        end.synchronize()
        return begin.elapsed_time(end) / 1000
