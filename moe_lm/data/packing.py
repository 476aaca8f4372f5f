"""Examples of unequal length, packed into full rows, and the rows into a batch."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batches import IGNORE, Batch, pack


@dataclass(frozen=True)
class Example:
    """A sequence of tokens to train on: input_ids and targets [tokens - 1], IGNORE where nothing is trained."""

    input_ids: NDArray[Any]
    targets: NDArray[Any]


def next_tokens(ids: Sequence[int], trained: Sequence[bool]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets [tokens - 1] of a sequence of ids, where `trained` marks the ids to be learned."""
    tokens = np.array(ids, np.int32)
    return tokens[:-1], np.where(trained[1:], tokens[1:], np.int32(IGNORE))


def pack_examples(
    rows: Sequence[Sequence[Example]], length: int, pad_id: int, separate: bool = True
) -> tuple[Batch, NDArray[np.int64]]:
    """A batch of rows of `length` tokens, each with its examples one after the other and then padding.

    With `separate` every example is an attention segment of its own. Also returns the number of each token's example,
    [rows, sequence], counted over the batch; padding has the number of all examples.
    """
    input_ids = np.full((len(rows), length), pad_id, np.int64)
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


def rows_at(rows: Sequence[list[int]], numbers: Sequence[int]) -> list[list[int]]:
    """The rows of these numbers; a number past the last row gives an empty row, which becomes padding."""
    return [rows[number] if number < len(rows) else [] for number in numbers]
