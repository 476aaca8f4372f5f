"""A gradient that is not finite on one rank: all ranks skip the step, unchanged (FAULTS rows 18, 19)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes import finish, start_program


@pytest.mark.parametrize(("stage", "factor"), [(0, "inf"), (1, "inf"), (3, "nan")])
def test_every_rank_skips_the_step_and_keeps_its_state(stage: int, factor: str) -> None:
    first, *_ = finish(start_program(2, Path(__file__).with_name("poisoned_ranks.py"), stage, factor))
    found = json.loads(first)
    assert found["steps"] == [[False, False], [False, False], [True, True], [False, False]]
    assert found["broken"] == 0
