"""Ranks meet and agree, and fail in one sentence; light ones, forked from this process (eval/bench/meeting.py)."""

from __future__ import annotations

import signal

import pytest

from eval.bench.meeting import run
from moe_lm.parallel.topology import Topology

RANKS = 8


def test_ranks_meet_and_the_one_with_another_setting_is_named_once() -> None:
    outcome = run(RANKS, "differ")
    assert outcome.codes == [2] * RANKS
    assert outcome.said == (
        "error: rank 7 on host-000 has train.setting_7=another, rank 0 on host-000 has a value of some length; start "
        "every rank with the same config, code and versions\n"
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_once_and_those_that_part_say_nothing() -> None:
    outcome = run(RANKS, "die")
    assert outcome.codes == [1] * (RANKS - 1) + [-signal.SIGKILL]
    (said,) = outcome.said.splitlines()
    assert said.startswith("error: lost rank 7 on host-000, which has ended or does not answer (last: starting)")
    outcome = run(RANKS, "part", gloo=True)
    assert (outcome.codes, outcome.said) == ([0] * RANKS, "")


def test_many_ranks_are_named_in_a_few_words() -> None:
    topology = Topology(0, 64, hosts=tuple(f"host-{rank // 8}" for rank in range(64)))
    assert topology.named([1, 3, 4, 8, 9, 10, 11]) == "ranks 1, 3, 4 and 8 to 11 on host-0, host-1"
    assert topology.named(range(64)) == "ranks 0 to 63 on host-0, host-1, host-2, host-3 and 4 more hosts"
    assert [rank for rank in range(64) if Topology(rank, 64, hosts=topology.hosts).is_first_of_host] == [
        *range(0, 64, 8)
    ]
