"""Conversations -> packed batches in which the assistant's words alone are trained on.

Conversations are never cut: one that is longer than a row is left out and counted.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lm.chat_config import ChatDataConfig, ChatSource
from moe_lm.data.batches import Batch, pack
from moe_lm.data.conversations import nothing_usable, read_dialogues, split_held_out
from moe_lm.data.files import Report
from moe_lm.data.shuffle import shuffle_key, shuffled
from moe_lm.data.targets import IGNORE, next_tokens
from moe_lm.errors import UsageError
from moe_lm.tokenization import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: input_ids and targets [tokens - 1] int32, IGNORE where the assistant does not speak.

    `hash` is that of its messages and decides on which side of the held-out split it falls.
    """

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    hash: int


@dataclass(frozen=True)
class ChatData:
    """The two sides of the split, and what was read and skipped for both."""

    train: list[Conversation]
    validation: list[Conversation]
    report: Report


def read_chat(config: ChatDataConfig, tokenizer: Tokenizer) -> ChatData:
    """Read and render all conversations; those for validation come from sources of their own or out of `train`.

    Raises UsageError for a file that does not exist, and when there is nothing to train on.
    """
    report = Report()
    train = read_conversations(config.train, tokenizer, config.sequence_length, report)
    validation = read_conversations(config.validation, tokenizer, config.sequence_length, report)
    train, held_out = split_held_out(train, config.validation_fraction)
    if not train:
        raise nothing_usable(config.train, "conversation", report)
    return ChatData(train, validation + held_out, report)


def read_conversations(
    sources: Sequence[ChatSource], tokenizer: Tokenizer, sequence_length: int, report: Report
) -> list[Conversation]:
    """The conversations of all sources that fit into `sequence_length` tokens."""
    conversations = []
    for row in read_dialogues(sources, report):
        try:
            ids, loss_mask = tokenizer.encode_chat(row.content.messages)
        except UsageError as error:
            report.skip(str(error), row.where)
            continue
        conversation = Conversation(*next_tokens(ids, loss_mask), row.hash)
        if len(conversation.input_ids) > sequence_length:
            report.skip(f"longer than sequence_length={sequence_length}", row.where)
            continue
        report.documents += 1
        report.text_bytes += sum(len((message["content"] or "").encode()) for message in row.content.messages)
        conversations.append(conversation)
    return conversations


class ChatBatches:
    """Training batches of packed conversations; a `BatchSource`. Every row comes once an epoch, in a new order each."""

    def __init__(
        self,
        conversations: Sequence[Conversation],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        separate_documents: bool,
        pad_id: int,
    ) -> None:
        self._rows = _Rows(conversations, sequence_length, separate_documents, pad_id)
        self._batch_size = global_batch_size
        self._seed = seed
        self.fingerprint = hashlib.sha256(",".join(str(item.hash) for item in conversations).encode()).hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that hold as many sequences as there are rows, rounded up."""
        return -(-len(self._rows) // self._batch_size)

    def batch(self, step: int, rows: range) -> Batch:
        sequences = step * self._batch_size + np.arange(rows.start, rows.stop, rows.step)
        epoch, place = np.divmod(sequences, len(self._rows))
        return self._rows.batch(shuffled(place, len(self._rows), shuffle_key(self._seed, epoch)).tolist())


def chat_evaluation_batches(
    conversations: Sequence[Conversation],
    sequence_length: int,
    batch_size: int,
    separate_documents: bool,
    pad_id: int,
) -> Iterator[Batch]:
    """Every conversation once, in batches of one shape; the last one is filled up with rows of padding."""
    rows = _Rows(conversations, sequence_length, separate_documents, pad_id)
    for first in range(0, len(rows), batch_size):
        yield rows.batch(range(first, first + batch_size))


class _Rows:
    """Conversations packed into rows, which become tokens when a batch asks for them."""

    def __init__(
        self, conversations: Sequence[Conversation], length: int, separate_documents: bool, pad_id: int
    ) -> None:
        self._conversations = conversations
        self._rows = pack_rows([len(item.input_ids) for item in conversations], length)
        self._length = length
        self._separate = separate_documents
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers; a number past the last row gives padding."""
        input_ids = np.full((len(numbers), self._length), self._pad_id, np.int64)
        targets = np.full_like(input_ids, IGNORE)
        bounds = []
        for row, number in enumerate(numbers):
            end = 0
            bounds.append(row * self._length)
            for index in self._rows[number] if number < len(self._rows) else ():
                item = self._conversations[index]
                begin, end = end, end + len(item.input_ids)
                input_ids[row, begin:end] = item.input_ids
                targets[row, begin:end] = item.targets
                if self._separate:
                    bounds.append(row * self._length + end)
            bounds.append(row * self._length + end)
        bounds.append(input_ids.size)
        return pack(input_ids, targets, np.unique(bounds))


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
