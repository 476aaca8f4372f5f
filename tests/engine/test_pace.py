"""A slow rank is named within 20 steps, and a healthy one never: from timings of real runs, and from regular ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import nn

from moe_lm.engine.pace import WINDOW, Pace, SlowRank, typical
from moe_lm.parallel.topology import Topology

# Milliseconds of the own work in each step of ranks 0 and 1, recorded on two busy cores; rank 1 is slowed after step 9.
RECORDED = {
    "stopped for 200 ms of every 267 ms": (
        [
            15, 36, 29, 57, 35, 52, 31, 19, 17, 21, 36, 18, 31, 24, 30, 24, 26, 17, 33, 26, 23, 29,
            15, 17, 23, 17, 25, 22, 34, 24, 15, 29, 28, 30, 25, 25, 36, 32, 20, 20,
        ],
        [
            33, 30, 28, 105, 31, 28, 23, 23, 27, 218, 233, 28, 25, 227, 230, 234, 232, 235, 440, 35,
            217, 23, 15, 15, 20, 239, 229, 13, 16, 17, 235, 23, 24, 29, 29, 35, 26, 227, 32, 229,
        ],
    ),
    "25% of a processor, in periods of 100 ms": (
        [
            29, 33, 31, 30, 31, 30, 26, 32, 32, 34, 38, 15, 33, 32, 47, 52, 65, 71, 85, 44, 48, 52,
            57, 33, 87, 35, 20, 32, 39, 37, 14, 16, 54, 43, 45, 46, 59, 36, 33, 26,
        ],
        [
            34, 27, 25, 31, 27, 33, 31, 29, 40, 113, 104, 114, 103, 41, 115, 117, 214, 193, 107,
            107, 104, 21, 104, 104, 32, 94, 111, 102, 31, 114, 96, 187, 40, 30, 216, 16, 204, 17,
            18, 104,
        ],
    ),
}  # fmt: skip
SLOWED_FROM = 9


class Recording:
    """The exchange of rank 0, which plays what the ranks need for every step, in seconds."""

    def __init__(self, ranks: Sequence[Sequence[float]]) -> None:
        self.ranks, self.step = ranks, 0

    def begin_work(self) -> None: ...

    def end_work(self) -> None: ...

    def take_seconds(self) -> float:
        self.step += 1
        return self.ranks[0][self.step - 1]

    def gather(self, own: float, reading: float) -> list[list[float]]:
        """The others read for three quarters of their time."""
        others = [typical(rank[self.step - WINDOW : self.step]) for rank in self.ranks[1:]]
        return [[own, *others], [reading, *(0.75 * seconds for seconds in others)]]


def named(ranks: Sequence[Sequence[float]], step_seconds: float = 0.0) -> list[tuple[int, SlowRank]]:
    """The slow ranks that are named, and after which step."""
    engine = SimpleNamespace(
        exchange=Recording(ranks), topology=Topology(0, len(ranks), hosts=("a", "b", "c")), loss=nn.Identity()
    )
    pace = Pace(cast(Any, engine))
    steps: Iterable[float] = (step_seconds or 3 * max(step) for step in zip(*ranks, strict=True))
    found = []
    for number, seconds in enumerate(steps, 1):
        with pace.reading():
            pass
        found.append((number, pace.step(seconds)))
    return [(number, slow) for number, slow in found if slow is not None]


@pytest.mark.parametrize("how", RECORDED)
def test_a_rank_that_is_stopped_in_turns_is_named_within_20_steps(how: str) -> None:
    ranks = [[milliseconds / 1000 for milliseconds in rank] for rank in RECORDED[how]]
    (first, slow), *_ = named(ranks)
    assert SLOWED_FROM < first <= SLOWED_FROM + 20
    assert slow.rank == 1
    assert slow.text.startswith("rank 1 on b keeps the others waiting: a step needs 0.")


def test_a_rank_that_is_slow_in_every_third_step_is_named_within_20_steps() -> None:
    """Half of its steps are as fast as those of the others."""
    (first, slow), *_ = named([[0.02] * 30, [0.02, 0.02, 0.2] * 10])
    assert first <= 20
    assert (slow.rank, slow.others_seconds) == (1, pytest.approx(0.02))


def test_a_steadily_slow_rank_is_named_within_20_steps_and_again_after_a_hundred() -> None:
    ranks = [[0.02] * 250, [0.02] * 7 + [0.04] * 243, [0.02] * 250]
    found = named(ranks)
    assert [number for number, _ in found] == [20, 120, 220]
    assert all(slow.rank == 1 and slow.others_seconds == pytest.approx(0.02) for _, slow in found)


@pytest.mark.parametrize(
    "delayed",
    [
        dict.fromkeys(range(4, 200, 10), 5.0),  # a garbage collection, or a slow read
        dict.fromkeys(range(40, 45), 0.035),  # something else on the machine, once
    ],
)
def test_a_healthy_rank_is_not_named(delayed: dict[int, float]) -> None:
    ranks = [[0.02] * 200, [delayed.get(step, 0.02) for step in range(200)]]
    assert named(ranks) == []


def test_ranks_that_delay_no_step_are_not_named() -> None:
    """Twice the time of the others, but little of a step."""
    assert named([[0.001] * 60, [0.002] * 60], step_seconds=0.1) == []


def test_a_slow_rank_is_named_with_the_seconds_in_which_it_reads() -> None:
    """Those of that rank: it alone may have a slow disk."""
    ((_, slow),) = named([[0.02] * 24, [0.02] * 7 + [0.04] * 17])
    assert slow.data_seconds == pytest.approx(0.03)
    assert "needs 0.04 s of its own there, 0.03 s of them to wait for its data, and 0.02 s on the others" in slow.text
