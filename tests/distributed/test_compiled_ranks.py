"""Compiled blocks on several ranks: the same losses, as few graphs as one process has, nothing compiled twice."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.processes import finish, start_program

PROGRAM = Path(__file__).with_name("compiled_ranks.py")
SELECTIVE = [("torch", "selective"), ("deepspeed", "selective")]
OTHERS = [("torch", "none"), ("torch", "full"), ("deepspeed", "none"), ("deepspeed", "full")]


@pytest.mark.parametrize(
    ("backend", "layouts"),
    [
        ("aot_eager", SELECTIVE),
        pytest.param("aot_eager", OTHERS, marks=pytest.mark.slow),
        pytest.param("inductor", SELECTIVE, marks=pytest.mark.slow),
    ],
)
def test_ranks_train_on_compiled_blocks(backend: str, layouts: list[tuple[str, str]]) -> None:
    """Data or expert parallel: the compiler stops at exchanges alone, and compiles nothing for new loads."""
    first, _ = finish(start_program(2, PROGRAM, backend, *itertools.chain(*layouts)), seconds=400)
    for (engine, recomputation), found in zip(layouts, json.loads(first), strict=True):
        layout = f"{engine}, recomputation {recomputation}"
        for step, expected in zip(found["losses"], found["expected"], strict=True):
            assert step == pytest.approx(expected, rel=1e-5), layout
        assert found["again"] == [], f"{layout}: compiled again, because of these"
        stops = set(found["breaks"])
        if engine == "torch":
            assert (found["graphs"], stops) == (1, set()), layout
        else:
            assert found["graphs"] <= 4, layout
            assert all("`torch.compiler.disable()`d function" in stop for stop in stops), layout
