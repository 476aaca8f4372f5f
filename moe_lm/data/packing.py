"""Examples of unequal length, packed into full rows, and the rows into the batches of fine-tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batches import IGNORE, Batch, MixedBatches, pack
from moe_lm.data.order import Mixture


@dataclass(frozen=True)
class Example:
    """A sequence of tokens to train on: input_ids and targets [tokens - 1], IGNORE where nothing is trained."""

    input_ids: NDArray[Any]
    targets: NDArray[Any]


def next_tokens(ids: Sequence[int], trained: Sequence[bool]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets [tokens - 1] of a sequence of ids, where `trained` marks the ids to be learned."""
    tokens = np.array(ids, np.int32)
    return tokens[:-1], np.where(trained[1:], tokens[1:], np.int32(IGNORE))


class PackedRows(ABC):
    """Items packed into rows, `sizes` rows of each source; a subclass makes batches of them."""

    def __init__(self, lengths: Sequence[int], capacity: int, sources: Sequence[int] = ()) -> None:
        source_of = np.array(sources or [0] * len(lengths), np.int64)
        self._rows: list[list[int]] = []
        self.sizes: list[int] = []
        for source in range(int(source_of.max(initial=0)) + 1):
            members = np.flatnonzero(source_of == source).tolist()
            rows = pack_rows([lengths[member] for member in members], capacity)
            self._rows += [[members[place] for place in row] for row in rows]
            self.sizes.append(len(rows))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that is equal only for equal items in equal order."""

    @abstractmethod
    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers; a number past the last row gives padding."""

    def items_in(self, numbers: Sequence[int]) -> list[list[int]]:
        """The items in each of these rows."""
        return [self._rows[number] if number < len(self._rows) else [] for number in numbers]

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every item once, in batches of one shape, each with the numbers of its items. The last is filled up."""
        for first in range(0, len(self), batch_size):
            numbers = range(first, first + batch_size)
            yield [item for row in self.items_in(numbers) for item in row], self.batch(numbers)


class RowBatches(MixedBatches):
    """Training batches of packed rows. Every row comes once per epoch, in a new order each time.

    With `weights`, the relative shares of the sources, each source has its own epochs. `steps_per_epoch` is rounded up.
    """

    def __init__(
        self, rows: PackedRows, global_batch_size: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        self._rows = rows
        self._first_row = np.cumsum([0, *rows.sizes])
        super().__init__(Mixture(rows.sizes, weights or [1.0], seed), rows.fingerprint, global_batch_size)
        self.steps_per_epoch = -(-len(rows) // global_batch_size)

    def batch(self, step: int, rows: range) -> Batch:
        source, row = self._mixture.items(step * self._batch_size + np.asarray(rows))
        return self._rows.batch((self._first_row[source] + row).tolist())


def pack_examples(
    rows: Sequence[Sequence[Example]], length: int, pad_id: int, separate: bool = True
) -> tuple[Batch, NDArray[np.int32]]:
    """A batch of rows of `length` tokens, each with its examples one after the other and then padding.

    With `separate` every example is an attention segment of its own. Also returns the number of each token's example,
    [rows, sequence], counted over the batch; padding has the number of all examples.
    """
    input_ids = np.full((len(rows), length), pad_id, np.int32)
    targets = np.full_like(input_ids, IGNORE)
    numbers = np.full_like(input_ids, sum(map(len, rows)))
    bounds, number = [0], 0
    for row, examples in enumerate(rows):
        end = 0
        for example in examples:
            begin, end = end, end + len(example.input_ids)
            input_ids[row, begin:end] = example.input_ids
            targets[row, begin:end] = example.targets
            numbers[row, begin:end] = number
            number += 1
            if separate:
                bounds.append(row * length + end)
        bounds += [row * length + end, (row + 1) * length]
    return pack(input_ids, targets, np.unique(bounds)), numbers


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The items of each row, in few rows: best-fit decreasing, so the longest first, each where the least room is left.

    Every length has to be at most `capacity`.
    """
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room that have rows, ascending
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(rooms, lengths[item])
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[place]
        rows[row].append(item)
        left = room - lengths[item]
        if not rows_with_room[left]:
            insort(rooms, left)
        rows_with_room[left].append(row)
    return rows
