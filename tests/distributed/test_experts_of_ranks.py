"""Experts that get no token or a gradient that is not finite, on some of the ranks (FAULTS rows 18, 19 and 23)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import finish, start_program


def run(world_size: int, *arguments: object) -> Any:
    """What rank 0 found."""
    first, *_ = finish(start_program(world_size, Path(__file__).with_name("experts_of_ranks.py"), *arguments))
    return json.loads(first)


def test_every_rank_skips_a_step_that_is_not_finite_or_above_its_limit_and_keeps_its_state() -> None:
    """On the torch engine, and with 2 expert-parallel ranks under ZeRO 1, 2 and 3."""
    trained, skipped = [False, False], [True, True]
    for found in run(2, "poisoned", 0, "inf", 1, "inf", 2, "nan", 3, "nan"):
        assert found["steps"] == [trained, trained, skipped, trained, skipped, trained]
        assert found["broken"] == 0


def test_a_rank_without_tokens_takes_part() -> None:
    """The exchange completes, and the gradients of its experts are zero, not None."""
    expected, found = run(1, "starved", "torch"), run(4, "starved", "deepspeed")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, norms in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(norms, rel=1e-5)
        assert all(norm > 0 for norm in norms[:2])
        assert found["gradients"][name][2:] == [0.0] * 6
