"""The order that batches follow: which item of which source comes when, a pure function of seed and visit number.

Nothing is stored between steps: any visit can be asked for, in any order, by any rank. Position i of a shuffled
sequence is computed only from i and a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError

MIX_BLOCK = 4096  # visits in which the sources have their exact shares
_ROUNDS = 8  # four make a random permutation in theory (Luby and Rackoff); a small range needs more to be even
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Items:
    """The items of a source in one phase of a run, and where in them the phase begins.

    size: items, of which each comes once an epoch. A source that is read in windows of several lengths has items of the
    longest, and in a phase of shorter ones `parts` of each. begun: parts that were passed before the phase.
    chunk: items whose parts are shuffled together: few, so that the next phase finds most others untouched.
    """

    size: int
    begun: int = 0
    parts: int = 1
    chunk: int = 1

    def after(self, visits: int, parts: int) -> Items:
        """The items of the next phase that reads this source, in so many `parts`.

        It goes on where this one ends, and where the length changes, behind the chunk that this one has begun.
        """
        begun = self.begun + visits
        if parts != self.parts:
            epoch, place = divmod(begun, self.size * self.parts)
            chunk = self.chunk * self.parts
            place = min(-(-place // chunk) * self.chunk, self.size)
            begun = (epoch * self.size + place) * parts
        return replace(self, begun=begun, parts=parts)

    def at(self, visits: NDArray[np.int64], key: Callable[..., NDArray[np.uint64]]) -> NDArray[np.int64]:
        """The item, or part, of the source's own visits [n] in this phase; `key` makes a key from numbers."""
        epoch, place = np.divmod(self.begun + visits, self.size * self.parts)
        if self.parts == 1:
            return shuffled(place, self.size, key(epoch))
        number, place = np.divmod(place, self.chunk * self.parts)
        last, rest = divmod(self.size, self.chunk)
        for size, among in ((self.chunk, number < last), (rest, number == last)):
            place[among] = shuffled(place[among], size * self.parts, key(epoch[among], 1 + number[among]))
        item, part = np.divmod(place, self.parts)
        return shuffled(number * self.chunk + item, self.size, key(epoch)) * self.parts + part


class Mixture:
    """Sources of some items each, visited by weight (relative shares of the visits; 0: not at all).

    A visit takes its source from a shuffled block of exact shares, and its item from a shuffle of the source's items, a
    new one each epoch. A source's own visits are numbered in the order in which they come, so that it visits every item
    once before any item again. With `exact_epochs` false they are numbered as in the first runs of this program, whose
    epochs of several sources overlapped within a block. `phase` is the number of the phase whose visits these are.
    Raises UsageError for more sources than a block has visits.
    """

    def __init__(
        self,
        sizes: Sequence[int] | Sequence[Items],
        weights: Sequence[float],
        seed: int,
        exact_epochs: bool = True,
        phase: int = 0,
    ) -> None:
        if len(sizes) > MIX_BLOCK:
            raise UsageError(f"{len(sizes)} sources are more than can be mixed, {MIX_BLOCK}; join some of them")
        self._sources = [Items(size) if isinstance(size, int) else size for size in sizes]
        self._weights = weights
        self._seed = seed
        self._phase = phase
        self._shares = block_shares(weights)
        self._exact_epochs = exact_epochs

    def in_first_order(self) -> Mixture:
        """The same sources with `exact_epochs` false."""
        return Mixture(self._sources, self._weights, self._seed, exact_epochs=False)

    def then(self, visits: int, parts: Sequence[int], weights: Sequence[float]) -> Mixture:
        """The mixture of the next phase, after so many visits, with other weights and `parts` of each source's items.

        A source that is not read keeps its place.
        """
        sources = [
            items.after(taken, count) if weight else items.after(taken, items.parts)
            for items, taken, count, weight in zip(self._sources, self.taken(visits), parts, weights, strict=True)
        ]
        return Mixture(sources, weights, self._seed, self._exact_epochs, self._phase + 1)

    def fingerprint(self, data: str) -> str:
        """Equal only for equal `data` (a hash of what the sources hold) in equal order. One source has one order."""
        if len(self._sources) == 1 or not self._exact_epochs:
            return data
        return in_exact_epochs(data)

    def items(self, visits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each visit, numbered over the phase, and the item in that source. [n] -> [n], [n]"""
        if (only := self._only_source) is not None:
            return np.full_like(visits, only), self._item(only, visits)
        block, place = np.divmod(visits, MIX_BLOCK)
        numbers, row = np.unique(block, return_inverse=True)
        mixed = self._mixed(numbers)
        bounds = np.cumsum(self._shares)
        sources = np.searchsorted(bounds, mixed, side="right")
        turns = _ranks(sources) if self._exact_epochs else mixed
        sources, turns = sources[row, place], turns[row, place]
        items = np.empty_like(visits)
        for source, share in enumerate(self._shares):
            mine = sources == source
            # The turns of one source are numbered through from block to block: these are its own visits, each once.
            items[mine] = self._item(source, block[mine] * share + turns[mine] - (bounds[source] - share))
        return sources, items

    def taken(self, visits: int) -> list[int]:
        """The visits of each source among the first `visits`."""
        if (only := self._only_source) is not None:
            return [visits * (source == only) for source in range(len(self._sources))]
        block, rest = divmod(visits, MIX_BLOCK)
        begun = np.searchsorted(np.cumsum(self._shares), self._mixed(np.array([block]))[0, :rest], side="right")
        counts = np.bincount(begun, minlength=len(self._shares))
        return [block * share + int(count) for share, count in zip(self._shares, counts, strict=True)]

    def epochs(self, visits: int) -> list[float]:
        """How often each source is read over this many visits."""
        shares = zip(self._shares, self._sources, strict=True)
        return [visits * share / MIX_BLOCK / (items.size * items.parts) for share, items in shares]

    @property
    def num_items(self) -> int:
        """Items of an epoch of all sources together."""
        return sum(items.size * items.parts for items in self._sources)

    @property
    def _only_source(self) -> int | None:
        """The source that is read alone."""
        return self._shares.index(MIX_BLOCK) if MIX_BLOCK in self._shares else None

    def _mixed(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shuffle of each block's places. [blocks] -> [blocks, MIX_BLOCK]"""
        places = np.tile(np.arange(MIX_BLOCK), len(blocks))
        phase = (self._phase,) if self._phase else ()
        keys = np.repeat(shuffle_key(self._seed, 0, blocks, *phase), MIX_BLOCK)
        return shuffled(places, MIX_BLOCK, keys).reshape(len(blocks), MIX_BLOCK)

    def _item(self, source: int, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """The item of a source's own visits [n]: every item once an epoch."""
        return self._sources[source].at(visits, partial(shuffle_key, self._seed, 1 + source))


def in_exact_epochs(data: str) -> str:
    """The fingerprint of several sources that hold `data` and whose epochs do not overlap."""
    return hashlib.sha256(f"{data}, epochs are exact".encode()).hexdigest()


def data_step(step: int, windows: Sequence[tuple[int, int]]) -> int:
    """The step, in an undisturbed run, of the data that this one reads when the windows, in order, are left out."""
    for start, stop in windows:
        if step >= start:
            step += stop - start
    return step


def block_shares(weights: Sequence[float]) -> list[int]:
    """The visits of MIX_BLOCK that each source gets, by largest remainder: at least one, or none at weight 0."""
    exact = np.asarray(weights, np.float64) / sum(weights) * MIX_BLOCK
    shares = np.maximum(exact > 0, np.floor(exact)).astype(int)
    while (missing := MIX_BLOCK - int(shares.sum())) != 0:
        place = np.argmax(exact - shares) if missing > 0 else np.argmax(shares)
        shares[place] += np.sign(missing)
    return [int(share) for share in shares]


def shuffle_key(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit key per element from non-negative numbers, like (seed, source, epoch); scalars broadcast."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix(key ^ _mix(np.atleast_1d(np.asarray(part, np.uint64))))
    return key


def shuffled(positions: NDArray[np.int64], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The permutation of range(size) that `key` names, at `positions` [n]; `key` is [1] or one a position [n].

    A Feistel network over the bits that `size` needs. A result outside the range goes through the network again (cycle
    walking), fewer than two times on average because the domain is smaller than 2 x size. Of 5 or 6 items, over all
    keys, some come to some places about 3% more often than to others; mending that would change begun runs.
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


def _ranks(sources: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each visit of a block when its visits are sorted by source and then by time. [blocks, n]"""
    return np.argsort(np.argsort(sources, axis=-1, kind="stable"), axis=-1)


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
