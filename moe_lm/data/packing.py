"""Documents of unequal length -> full rows, and rows -> a batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batches import IGNORE, Batch, pack


class Document(Protocol):
    """Tokens with targets, as `next_tokens` gives them: [tokens - 1] each."""

    @property
    def input_ids(self) -> NDArray[Any]: ...
    @property
    def targets(self) -> NDArray[Any]: ...


def pack_documents(
    rows: Sequence[Sequence[Document]], length: int, pad_id: int, separate: bool = True
) -> tuple[Batch, NDArray[np.int64]]:
    """A batch of rows of `length` tokens, each of its documents one after the other and then padding.

    With `separate` every document is a segment of attention of its own. Also returns which document each token is of,
    [rows, sequence], numbered in order; padding has the number of all documents.
    """
    input_ids = np.full((len(rows), length), pad_id, np.int64)
    targets = np.full_like(input_ids, IGNORE)
    numbers = np.full_like(input_ids, sum(map(len, rows)))
    bounds, number = [0], 0
    for row, documents in enumerate(rows):
        end = 0
        for document in documents:
            begin, end = end, end + len(document.input_ids)
            input_ids[row, begin:end] = document.input_ids
            targets[row, begin:end] = document.targets
            numbers[row, begin:end] = number
            number += 1
            if separate:
                bounds.append(row * length + end)
        bounds += [row * length + end, (row + 1) * length]
    return pack(input_ids, targets, np.unique(bounds)), numbers


def pack_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into as few rows as best-fit-decreasing finds: longest first, each where the least room is left over.

    Returns the items of each row. Raises nothing: every length has to be at most `capacity`.
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
