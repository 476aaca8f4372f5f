"""Figures of long runs in bounded memory: means over equal spans, and items that are evenly spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float64]


@dataclass
class Span:
    """Rows that lie together, by their columns; NaN is a figure that a row does not have."""

    rows: int
    sums: Row
    counts: Row
    lows: Row
    highs: Row

    def take(self, other: Span) -> None:
        """Take in the rows of another span."""
        self.rows += other.rows
        self.sums += other.sums
        self.counts += other.counts
        np.fmin(self.lows, other.lows, out=self.lows)
        np.fmax(self.highs, other.highs, out=self.highs)


class Spans:
    """Rows as means, lows and highs over equal numbers of them: `count` to 2 * `count` spans for a long run."""

    def __init__(self, count: int) -> None:
        self.count, self.rows_of_a_span = count, 1
        self._spans: list[Span] = []

    def add(self, row: Row) -> None:
        there = ~np.isnan(row)
        found = Span(1, np.where(there, row, 0.0), there.astype(np.float64), row.copy(), row.copy())
        if self._spans and self._spans[-1].rows < self.rows_of_a_span:
            self._spans[-1].take(found)
            return
        if len(self._spans) == 2 * self.count:
            for first, second in zip(self._spans[::2], self._spans[1::2], strict=True):
                first.take(second)
            self._spans = self._spans[::2]
            self.rows_of_a_span *= 2
        self._spans.append(found)

    def __len__(self) -> int:
        return len(self._spans)

    def means(self) -> Row:
        """[spans, columns]; NaN where no row of a span has the figure."""
        if not self._spans:
            return np.zeros((0, 0))
        counts = np.stack([span.counts for span in self._spans])
        sums = np.stack([span.sums for span in self._spans])
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)

    def lows(self) -> Row:
        return np.stack([span.lows for span in self._spans])

    def highs(self) -> Row:
        return np.stack([span.highs for span in self._spans])


class Spread:
    """Of many items at most 2 * `count`, evenly spread, and always the newest."""

    def __init__(self, count: int) -> None:
        self.number = 0  # of all that came
        self._count, self._every = count, 1
        self._kept: list[Any] = []
        self.newest: Any = None

    def add(self, item: Any) -> None:
        if self.number % self._every == 0:
            self._kept.append(item)
        self.number += 1
        self.newest = item
        if len(self._kept) == 2 * self._count:
            self._kept = self._kept[::2]
            self._every *= 2

    @property
    def items(self) -> list[Any]:
        is_kept = not self._kept or self._kept[-1] is self.newest
        return self._kept if is_kept else [*self._kept, self.newest]
