"""The place of a rank among the others."""

from __future__ import annotations

from moe_lm.parallel.topology import Topology


def test_ranks_of_a_host_are_counted_by_its_name() -> None:
    hosts = ("a", "b", "b", "b")
    assert [Topology(rank, 4, hosts=hosts).ranks_on_this_host for rank in range(4)] == [1, 3, 3, 3]
    assert Topology(1, 4).ranks_on_this_host == 4
