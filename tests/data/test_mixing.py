"""Visits of sources by weight: exact shares in every block, every item once an epoch, any visit by itself."""

from __future__ import annotations

import numpy as np
import pytest

from moe_lm.data.mixing import MIX_BLOCK, Mixture, block_shares


def test_each_source_has_its_share_of_every_block_and_its_items_are_visited_equally_often() -> None:
    sizes, weights = [10, 100, 7], [2.0, 1.0, 1.0]
    sources, items = Mixture(sizes, weights, seed=3).items(np.arange(3 * MIX_BLOCK))
    for block in range(3):
        here = sources[block * MIX_BLOCK : (block + 1) * MIX_BLOCK]
        assert np.bincount(here).tolist() == block_shares(weights) == [2048, 1024, 1024]
    for blocks in (1, 2, 3):
        for source, size in enumerate(sizes):
            seen = items[: blocks * MIX_BLOCK][sources[: blocks * MIX_BLOCK] == source]
            counts = np.bincount(seen, minlength=size)
            assert (len(counts), np.ptp(counts)) in ((size, 0), (size, 1))


def test_any_visit_can_be_asked_for_by_itself() -> None:
    mixture = Mixture([10, 20], [1.0, 5.0], seed=1)
    sources, items = mixture.items(np.arange(10_000))
    for visit in (0, 4095, 4096, 9999):
        alone = mixture.items(np.array([visit]))
        assert (alone[0][0], alone[1][0]) == (sources[visit], items[visit])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [Mixture([50], [1.0], seed).items(np.arange(100))[1].tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert orders[0][:50] != orders[0][50:]
    assert sorted(orders[0][:50]) == list(range(50))


@pytest.mark.parametrize(("weights", "shares"), [([1, 1, 1], [1366, 1365, 1365]), ([1, 1e9], [1, 4095]), ([7], [4096])])
def test_shares_are_the_weights_by_largest_remainder_and_at_least_one(weights: list[float], shares: list[int]) -> None:
    assert block_shares(weights) == shares
