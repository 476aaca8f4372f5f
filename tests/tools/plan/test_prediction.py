"""What the plan predicts beside what a real process takes; the whole comparison is eval/studies/prediction.py."""

from __future__ import annotations

import pytest

from eval.studies.prediction import Point, measure
from moe_lm.tools.plan.plan import tracer_of


@pytest.mark.slow
def test_the_peak_of_a_real_process_is_the_predicted_one() -> None:
    point = Point("small", ranks=1, stage=0, recompute="none")
    config = point.config()
    predicted = tracer_of(config.model, "cpu")(config, 1).memory.peak
    assert predicted == pytest.approx(measure([point], steps=2)[0]["bytes"], rel=0.1)
