"""A run that ends in time: its last step moves, again after every step, to where the time that is left ends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from moe_lm.config.training import TrainConfig

RECENT = 20  # steps whose mean time stands for those to come
LEAST_STEPS = 8  # of a run, however little time there is


class Timetable:
    """Fits the steps of a run to the time until `ends`, a moment of `clock` in seconds.

    There are at most `most_steps`, by default those that the config has. `after` is the time that is needed once the
    steps are done, in seconds, given the seconds of a step. The first step, which compiles, does not count as one.
    With `wsd` the decay has its share of whatever the run becomes; once it has begun, the rate goes on falling from
    where it is, faster or slower. The warm-up is at most a quarter of the run.
    """

    def __init__(
        self,
        ends: float,
        config: TrainConfig,
        most_steps: int | None = None,
        after: Callable[[float], float] = lambda seconds_per_step: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ends, self._after, self._clock = ends, after, clock
        self._most, self._schedule = most_steps or config.steps, config.schedule
        schedule = config.schedule.model_copy(update={"warmup_steps": self._warmup(config.steps)})
        self.config = config.model_copy(update={"schedule": schedule})  # with the steps that fit, as far as is known
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=RECENT + 1)  # step and moment

    def fit(self, done: int) -> TrainConfig:
        """The settings with the last step that can be reached in time, now that `done` steps are taken."""
        now = self._clock()
        self._arrivals.append((done, now))
        first, began = self._arrivals[0]
        if done > first:
            seconds = (now - began) / (done - first)
            steps = done + int((self._ends - now - self._after(seconds)) / seconds)
            self.config = self._with_last_step(done, min(self._most, max(steps, LEAST_STEPS, done)))
        return self.config

    def _with_last_step(self, done: int, steps: int) -> TrainConfig:
        before, schedule = self.config, self._schedule
        if steps == before.steps:
            return before
        changes: dict[str, float] = {"warmup_steps": self._warmup(steps)}
        if schedule.name == "wsd" and steps > done:
            left = (before.steps - done) / (before.schedule.decay_fraction * before.steps)  # of the decay
            decay = min(schedule.decay_fraction * steps, steps - done) if left >= 1 else (steps - done) / left
            changes |= {"decay_fraction": min(1.0, decay / steps)}
        schedule = before.schedule.model_copy(update=changes)
        return before.model_copy(update={"steps": steps, "schedule": schedule})

    def _warmup(self, steps: int) -> int:
        return min(self._schedule.warmup_steps, steps // 4)
