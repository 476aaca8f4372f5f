"""The recent range of a run's losses, which guards and symptoms judge a loss by."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

RECENT = 100  # accepted losses that make the recent range
MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


def loss_limit(recent: Sequence[float], threshold: float | None) -> float:
    """The largest loss in range: `threshold` robust standard deviations above the median of the recent ones.

    And at least their largest, and a tenth above the median (a fifth of a nat where it is below 2): where the losses
    hardly differ, as in a model that knows its data by heart, a few deviations are nothing. The fewer are known, the
    further: at first three times the median, after 20 losses half above it. Without any, or a threshold, infinity.
    """
    if not recent or threshold is None:
        return math.inf
    median = statistics.median(recent)
    deviation = MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in recent)
    least = min(2.0, 10 / len(recent)) * max(median, 2.0)
    return max(*recent, median + max(threshold * deviation, least))
