"""Compiled blocks on several ranks: the same losses, as few graphs as one process has, nothing compiled twice."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.processes import finish, start_program

PROGRAM = Path(__file__).with_name("compiled_ranks.py")
SELECTIVE = [("torch", "selective"), ("deepspeed", "selective")]
EXCHANGE = ("function Journey.", "function AllToAllDispatcher.exchange_counts", "function AllToAllDispatcher.splits")
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
    """Data or expert parallel: the compiler stops at exchanges alone, and does not compile for every load of experts.

    Beside the blocks' graphs there are those of the last norm, of what is measured of the routing and of the loss. The
    second load shows the compiler which sizes are not fixed, in two graphs: of the experts, and of adding up what comes
    back.
    """
    first, _ = finish(start_program(2, PROGRAM, backend, *itertools.chain(*layouts)), seconds=400)
    for (engine, recomputation), found in zip(layouts, json.loads(first), strict=True):
        layout = f"{engine}, recomputation {recomputation}"
        for step, expected in zip(found["losses"], found["expected"], strict=True):
            assert step == pytest.approx(expected, rel=1e-5), layout
        pieces, sizes_found = (1, 0) if engine == "torch" else (9, 2)
        assert len(found["again"]) <= sizes_found, (layout, found["again"])
        assert found["graphs"] <= pieces + 3 + sizes_found, layout
        elsewhere = [reason for reason in found["breaks"] if not any(name in reason for name in EXCHANGE)]
        assert elsewhere == [], layout
        assert bool(found["breaks"]) == (engine == "deepspeed"), layout
