"""Rendered conversations -> packed batches in which the assistant's words alone are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batches import Batch
from moe_lm.data.examples import Conversation
from moe_lm.data.order import Mixture
from moe_lm.data.packing import pack_documents, pack_rows


class ChatBatches:
    """Training batches of packed conversations; a `BatchSource`.

    Every row comes once an epoch, in a new order each. With `weights` (relative shares of the rows) each source is
    packed by itself and has epochs of its own.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        separate_documents: bool,
        pad_id: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        sources = np.array([item.source if weights else 0 for item in conversations])
        self._rows = _Rows(conversations, sequence_length, separate_documents, pad_id, sources)
        self._batch_size = global_batch_size
        self._mixture = Mixture(self._rows.sizes, weights or [1.0], seed)
        digest = hashlib.sha256()
        for item in conversations:
            digest.update(b"%d %d," % (item.source, len(item.input_ids)) + item.input_ids.tobytes())
            digest.update(item.targets.tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def steps_per_epoch(self) -> int:
        """Steps that hold as many sequences as there are rows, rounded up."""
        return -(-len(self._rows) // self._batch_size)

    def batch(self, step: int, rows: range) -> Batch:
        sequences = step * self._batch_size + np.arange(rows.start, rows.stop, rows.step)
        source, row = self._mixture.items(sequences)
        return self._rows.batch((self._rows.first[source] + row).tolist())


def chat_evaluation_batches(
    conversations: Sequence[Conversation],
    sequence_length: int,
    batch_size: int,
    separate_documents: bool,
    pad_id: int,
) -> Iterator[Batch]:
    """Every conversation once, in batches of one shape; the last one is filled up with rows of padding."""
    rows = _Rows(conversations, sequence_length, separate_documents, pad_id, np.zeros(len(conversations), np.int64))
    for first in range(0, len(rows), batch_size):
        yield rows.batch(range(first, first + batch_size))


class _Rows:
    """Conversations packed into rows, source by source, which become tokens when a batch asks for them.

    sizes, first: how many rows each source has, and the number of its first.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        length: int,
        separate_documents: bool,
        pad_id: int,
        sources: NDArray[np.int64],
    ) -> None:
        self._conversations = conversations
        self._rows: list[list[int]] = []
        self.sizes: list[int] = []
        for source in range(int(sources.max(initial=0)) + 1):
            members = np.flatnonzero(sources == source).tolist()
            rows = pack_rows([len(conversations[member].input_ids) for member in members], length)
            self._rows += [[members[place] for place in row] for row in rows]
            self.sizes.append(len(rows))
        self.first = np.cumsum([0, *self.sizes])
        self._length = length
        self._separate = separate_documents
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers; a number past the last row gives padding."""
        rows = [[self._conversations[index] for index in self._rows[n]] if n < len(self._rows) else [] for n in numbers]
        batch, _ = pack_documents(rows, self._length, self._pad_id, self._separate)
        return batch
