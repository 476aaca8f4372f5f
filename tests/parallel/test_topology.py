"""The place of a rank among the others."""

from __future__ import annotations

import pytest

from moe_lm.parallel.topology import Topology


def test_ranks_of_a_host_are_counted_as_the_launcher_says_or_by_the_hosts_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    hosts = ("a", "b", "b", "b")
    assert [Topology(rank, 4, hosts=hosts).ranks_on_this_host for rank in range(4)] == [1, 3, 3, 3]
    assert Topology(1, 4).ranks_on_this_host == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Topology(1, 4, hosts=hosts).ranks_on_this_host == 2
