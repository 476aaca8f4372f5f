"""Held-out batches, made when they are evaluated: a rank makes its own alone, and keeps none."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import overload

from moe_lm.data.batches import Batch


class HeldOut(Sequence[Batch]):
    """The batches that `make` gives for these numbers, each made anew whenever it is asked for; so are slices."""

    def __init__(self, make: Callable[[int], Batch], numbers: range) -> None:
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Batch: ...
    @overload
    def __getitem__(self, place: slice) -> HeldOut: ...
    def __getitem__(self, place: int | slice) -> Batch | HeldOut:
        found = self._numbers[place]
        return HeldOut(self._make, found) if isinstance(found, range) else self._make(found)


def one_after_the_other(sources: Sequence[HeldOut]) -> HeldOut:
    """The batches of several sources in order."""
    ends = [0, *accumulate(map(len, sources))]

    def make(number: int) -> Batch:
        source = bisect_right(ends, number) - 1
        return sources[source][number - ends[source]]

    return HeldOut(make, range(ends[-1]))
