"""The place of a rank among the others."""

from __future__ import annotations

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.parallel.topology import Topology


def test_ranks_of_a_host_are_counted_by_its_name() -> None:
    hosts = ("a", "b", "b", "b")
    assert [Topology(rank, 4, hosts=hosts).ranks_on_this_host for rank in range(4)] == [1, 3, 3, 3]
    assert Topology(1, 4).ranks_on_this_host == 4


def test_a_single_process_is_told_how_to_start_several() -> None:
    Topology(world_size=4).check_groups("parallel.expert_parallel_size", 2)
    with pytest.raises(
        UsageError, match=r"size=2 needs a multiple of 2 processes.* start it with --gpus 2, --processes 2"
    ):
        Topology().check_groups("parallel.expert_parallel_size", 2)
