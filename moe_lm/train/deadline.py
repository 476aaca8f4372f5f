"""The time by which a run has to have saved and ended: `train.hours` after its process began."""

from __future__ import annotations

from collections import deque

from moe_lm.common.process import seconds_since_start

RECENT_STEPS = 20  # of which the longest counts, with its evaluation
SPARE = 1.5  # times what a step and a save have taken
UNKNOWN_SAVE = 0.05, 600.0  # until one is measured: share of the time that is kept free for it, and at most so many s
LEAVING_SECONDS = 5.0  # to end the process


class Deadline:
    """Says when no further step may be begun, if the run is to be saved in time; never without `hours`.

    The main rank's clock counts, and tells the others in the exchange in which they tell each other of signals.
    """

    def __init__(self, hours: float | None) -> None:
        self._hours = hours
        self._begun = seconds_since_start()
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)

    @property
    def cause(self) -> str:
        """What to tell the user."""
        return f"train.hours={self._hours:g} are nearly over"

    def begin_step(self) -> None:
        self._begun = seconds_since_start()

    def end_step(self) -> None:
        """Measure a step with its evaluation, before it is saved."""
        self._steps.append(seconds_since_start() - self._begun)

    def is_near(self, longest_save: float | None, is_saved: bool = False, saves: int = 1) -> bool:
        """Whether there is no time for another step and `saves`, each of at most so many seconds if it is known.

        With `is_saved` only an evaluation is left to do, a batch of which needs no more than a step.
        """
        if self._hours is None:
            return False
        seconds = 3600 * self._hours
        save = min(UNKNOWN_SAVE[0] * seconds, UNKNOWN_SAVE[1]) if longest_save is None else SPARE * longest_save
        step = max(self._steps, default=0.0)
        needed = step if is_saved else SPARE * step + saves * save
        return seconds_since_start() + needed + LEAVING_SECONDS >= seconds
