"""Order: exact shares in every block, every item once an epoch, any visit by itself, shuffles that store nothing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.common.errors import UsageError
from moe_lm.data.order import MIX_BLOCK, Mixture, block_shares, shuffle_key, shuffled


def test_sources_have_their_shares_and_items_equal_visits() -> None:
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


@settings(deadline=None, max_examples=30)
@given(
    sources=st.lists(st.tuples(st.integers(1, 900), st.floats(0.01, 10)), min_size=1, max_size=6),
    seed=st.integers(0, 2**62),
)
def test_an_epoch_of_every_source_is_exact(sources: list[tuple[int, float]], seed: int) -> None:
    """Whatever the mix, and wherever its blocks end: each item once, then each once again in another order."""
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    source_of, items = Mixture(sizes, weights, seed).items(np.arange(3 * MIX_BLOCK))
    for source, size in enumerate(sizes):
        own = items[source_of == source]
        for epoch in np.split(own, range(size, len(own), size)):
            assert len(np.unique(epoch)) == len(epoch)


def test_a_run_that_began_with_the_first_order_can_keep_it() -> None:
    """The order of version 0.1.0 before its epochs were exact, as it computed it, to the last visit."""
    mixture = Mixture([50, 100, 7], [2.0, 1.0, 1.0], seed=3)
    exact, begun = (np.stack(order.items(np.arange(10_000))) for order in (mixture, mixture.in_first_order()))
    assert hashlib.sha256(begun.astype("<i8").tobytes()).hexdigest()[:16] == "c23e868ebedf7bd9"
    assert np.array_equal(exact[0], begun[0])  # the sources take their turns as before
    assert not np.array_equal(exact[1], begun[1])
    assert mixture.fingerprint("data") != mixture.in_first_order().fingerprint("data") == "data"


def test_one_source_has_one_order() -> None:
    mixture = Mixture([50], [1.0], seed=3)
    assert np.array_equal(mixture.items(np.arange(200))[1], mixture.in_first_order().items(np.arange(200))[1])
    assert mixture.fingerprint("data") == mixture.in_first_order().fingerprint("data") == "data"


def test_epochs_count_the_visits_of_every_item() -> None:
    mixture = Mixture([50, 100, 7], [2.0, 1.0, 1.0], seed=3)
    visits = 5 * MIX_BLOCK
    sources, _ = mixture.items(np.arange(visits))
    assert mixture.epochs(visits) == [np.sum(sources == source) / size for source, size in enumerate([50, 100, 7])]


def test_any_visit_can_be_asked_for_by_itself() -> None:
    mixture = Mixture([10, 20], [1.0, 5.0], seed=1)
    visits = np.append(np.arange(10_000), 400_000 * 4096 + np.arange(100))
    sources, items = mixture.items(visits)
    for visit in (0, 4095, 4096, 9999, 400_000 * 4096 + 77):
        alone = mixture.items(np.array([visit]))
        [place] = np.flatnonzero(visits == visit)
        assert (alone[0][0], alone[1][0]) == (sources[place], items[place])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = [Mixture([50], [1.0], seed).items(np.arange(100))[1].tolist() for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert orders[0][:50] != orders[0][50:]
    assert sorted(orders[0][:50]) == list(range(50))


@pytest.mark.parametrize(("weights", "shares"), [([1, 1, 1], [1366, 1365, 1365]), ([1, 1e9], [1, 4095]), ([7], [4096])])
def test_shares_are_the_weights_by_largest_remainder_and_at_least_one(weights: list[float], shares: list[int]) -> None:
    assert block_shares(weights) == shares


def test_more_sources_than_a_block_has_visits_are_refused() -> None:
    """Some would never be visited."""
    with pytest.raises(UsageError, match="5000 sources are more than can be mixed, 4096; join some of them"):
        Mixture([9] * 5000, [1.0] * 5000, seed=1)


@settings(deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**62))
def test_every_position_is_visited_exactly_once(size: int, seed: int) -> None:
    order = shuffled(np.arange(size), size, shuffle_key(seed))
    assert np.array_equal(np.sort(order), np.arange(size))


def test_each_position_may_have_its_own_key() -> None:
    epochs = np.array([0, 0, 1, 1, 7])
    positions = np.array([3, 99, 3, 99, 0])
    together = shuffled(positions, 1000, shuffle_key(5, epochs))
    alone = [shuffled(positions[[i]], 1000, shuffle_key(5, int(epochs[i])))[0] for i in range(5)]
    assert together.tolist() == alone


def test_another_key_is_another_order() -> None:
    orders = {tuple(shuffled(np.arange(50), 50, shuffle_key(1, epoch)).tolist()) for epoch in range(100)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [10, 1000])
def test_places_are_close_to_uniform_over_keys(size: int) -> None:
    """Chi-squared of where position 0 lands over 20,000 keys, in 10 bins: 9 degrees of freedom."""
    keys = shuffle_key(0, np.arange(20_000))
    places = shuffled(np.zeros(20_000, np.int64), size, keys)
    counts = np.bincount(places * 10 // size, minlength=10)
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # one in a thousand


def test_an_order_has_no_trend() -> None:
    order = shuffled(np.arange(100_000), 100_000, shuffle_key(3))
    steps = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(steps) < 0.02
