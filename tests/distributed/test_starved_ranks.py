"""Ranks whose experts get no token: the exchange completes, and their gradients are zero, not None (FAULTS row 23)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import finish, start_program


def run(world_size: int, engine: str) -> dict[str, Any]:
    """The losses and gradient norms that rank 0 found."""
    first, *_ = finish(start_program(world_size, Path(__file__).with_name("starved_ranks.py"), engine))
    found: dict[str, Any] = json.loads(first)
    return found


def test_a_rank_without_tokens_takes_part() -> None:
    expected, found = run(1, "torch"), run(4, "deepspeed")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, norms in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(norms, rel=1e-5)
        assert all(norm > 0 for norm in norms[:2])
        assert found["gradients"][name][2:] == [0.0] * 6
