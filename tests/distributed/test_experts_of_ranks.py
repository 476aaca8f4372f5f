"""Experts that get no token or a gradient that is not finite, on some of the ranks (FAULTS rows 18, 19 and 23);
and how tokens travel."""

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


@pytest.fixture(scope="module")
def four_ranks() -> Any:
    return run(4, "starved", "deepspeed")


def test_a_rank_without_tokens_takes_part(four_ranks: Any) -> None:
    """The exchange completes, and the gradients of its experts are zero, not None."""
    expected, found = run(1, "starved", "torch"), four_ranks
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, norms in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(norms, rel=1e-5)
        assert all(norm > 0 for norm in norms[:2])
        assert found["gradients"][name][2:] == [0.0] * 6


def test_a_token_travels_once_to_a_rank_and_its_results_are_added_up_there(four_ranks: Any) -> None:
    """Results and gradients are those of one process with all tokens, also on a rank that has none."""
    found = four_ranks["dispatched"]
    assert {name: of["sent"] for name, of in found.items()} == {
        "all on one rank": [[2, 1, 1, 1], [0, 0, 0, 0], [1, 2, 2, 1], [0, 0, 0, 1]],
        "one on every rank": [[5] * 4, [0] * 4, [6] * 4, [1] * 4],
        "none on rank 2": [[4, 3, 0, 5], [0, 0, 0, 0], [4, 5, 0, 6], [1, 1, 0, 1]],
        "all on rank 3": [[0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 6], [0, 0, 0, 1]],
    }
    assert max(of["difference"] for of in found.values()) < 1e-6
