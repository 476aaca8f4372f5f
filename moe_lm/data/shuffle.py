"""Shuffling without a stored order: position i of a shuffled sequence is computed from i and a key alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # four make a random permutation in theory (Luby and Rackoff); a small range needs more to be even
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffle_key(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit key per element out of non-negative numbers, like (seed, source, epoch); scalars broadcast."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key ^ _mix(np.atleast_1d(np.asarray(part, np.uint64))))
    return key


def shuffled(positions: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The permutation of range(size) that `key` names, at `positions` [n]; `key` is [1] or one a position [n].

    A Feistel network over the bits that `size` needs; what falls outside the range is sent through it again (cycle
    walking), which takes fewer than two turns on average because the domain is below 2 x size.
    """
    bits = max(2, (size - 1).bit_length())
    result = positions.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    outside = np.arange(len(result))
    while len(outside):
        walked = _feistel(result[outside], bits, keys[outside])
        result[outside] = walked
        outside = outside[walked >= size]
    return result.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    right_bits = np.uint64(bits // 2)
    left_mask, right_mask = np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1)
    left, right = values >> right_bits, values & right_mask
    for _ in range(_ROUNDS // 2):
        left = left ^ (_mix(right ^ key) & left_mask)
        right = right ^ (_mix(left ^ (key + _GOLDEN)) & right_mask)
        key = key + _GOLDEN + _GOLDEN
    return left << right_bits | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    values = values + _GOLDEN
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
