import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_lm.data.shuffle import shuffle_key, shuffled


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
