"""Which item of which source comes when: a pure function of the seed and the number of the visit.

Nothing is stored between steps: any visit can be asked for, in any order, by any rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.shuffle import shuffle_key, shuffled

MIX_BLOCK = 4096  # visits in which the sources have their exact shares


class Mixture:
    """Sources of `sizes` items each, visited by weight (relative shares of the visits).

    A visit takes its source from a shuffled block of exact shares, and its item from a shuffle of the source's items, a
    new one each epoch: within an epoch of a source every item comes once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self._sizes = sizes
        self._seed = seed
        self._shares = block_shares(weights)

    def items(self, visits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The sources of these visits, counted over the whole run, and the items in them. [n] -> [n], [n]"""
        if len(self._sizes) == 1:
            return np.zeros_like(visits), self._item(0, visits)
        block, place = np.divmod(visits, MIX_BLOCK)
        place = shuffled(place, MIX_BLOCK, shuffle_key(self._seed, 0, block))
        bounds = np.cumsum(self._shares)
        sources = np.searchsorted(bounds, place, side="right")
        items = np.empty_like(visits)
        for source, share in enumerate(self._shares):
            mine = sources == source
            # The block's places of a source are numbered through, block after block: its own visits, each once.
            items[mine] = self._item(source, block[mine] * share + place[mine] - (bounds[source] - share))
        return sources, items

    def _item(self, source: int, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """The item of a source's own visits [n]: every item once an epoch."""
        epoch, place = np.divmod(visits, self._sizes[source])
        return shuffled(place, self._sizes[source], shuffle_key(self._seed, 1 + source, epoch))


def block_shares(weights: Sequence[float]) -> list[int]:
    """How many of MIX_BLOCK visits each source gets: by largest remainder, at least one."""
    exact = np.asarray(weights, np.float64) / sum(weights) * MIX_BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(int)
    while (missing := MIX_BLOCK - int(shares.sum())) != 0:
        place = np.argmax(exact - shares) if missing > 0 else np.argmax(shares)
        shares[place] += np.sign(missing)
    return [int(share) for share in shares]
