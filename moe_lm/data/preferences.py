"""Preference pairs -> packed batches in which both answers of a pair stand in the same row.

So any slice of the global batch, a rank's or a micro-batch, holds whole pairs, and every layout computes the same loss.
A row has room for two sequences: a pair fits whenever each of its sides, prompt and answer, fits into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data import formats
from moe_lm.data.batches import IGNORE, Batch, next_tokens
from moe_lm.data.conversations import nothing_usable, read_pairs, split_held_out
from moe_lm.data.examples import render
from moe_lm.data.formats import Dialogue, Message
from moe_lm.data.order import Mixture
from moe_lm.data.packing import pack_documents, pack_rows
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer

SIDES = 2  # of a pair: the preferred answer first


class Side(NamedTuple):
    """Prompt and answer, rendered: input_ids and targets [tokens - 1] int32, IGNORE where the prompt stands."""

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]


@dataclass(frozen=True)
class Pair:
    """`hash` is that of the prompt and decides on which side of the held-out split the pair falls; `where` it stood."""

    chosen: Side
    rejected: Side
    hash: int
    where: str = ""

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.chosen, self.rejected

    @property
    def num_tokens(self) -> int:
        return sum(len(side.input_ids) for side in self.sides)


@dataclass(frozen=True)
class PreferenceData:
    """The two sides of the split, and what was read and skipped for both."""

    train: list[Pair]
    validation: list[Pair]
    report: Report


def read_preferences(config: ChatDataConfig, tokenizer: Tokenizer) -> PreferenceData:
    """Read and render all pairs; those for validation come from sources of their own or out of `train`.

    Raises UsageError for a file that does not exist, when there is nothing to train on, and for a tokenizer without a
    chat template that can be trained on.
    """
    tokenizer.chat_template  # noqa: B018 (without one every pair would be skipped)
    report = Report()
    train = _render_all(config.train, tokenizer, config.sequence_length, report)
    validation = _render_all(config.validation, tokenizer, config.sequence_length, report)
    train, held_out = split_held_out(train, config.validation_fraction)
    if not train:
        raise nothing_usable(config.train, "preference pair", report)
    return PreferenceData(train, validation + held_out, report)


class PairRows:
    """Pairs packed into rows of `2 * sequence_length` tokens, with the reference's log-probabilities once known."""

    def __init__(self, pairs: Sequence[Pair], sequence_length: int, pad_id: int) -> None:
        self.pairs = pairs
        self.reference = np.zeros((len(pairs), SIDES), np.float32)
        self._length = SIDES * sequence_length
        self._rows = pack_rows([pair.num_tokens for pair in pairs], self._length)
        self._pad_id = pad_id

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Equal for equal pairs in equal order alone."""
        digest = hashlib.sha256(f"{self._length},{len(self.pairs)}".encode())
        for pair in self.pairs:
            for side in pair.sides:
                digest.update(f";{len(side.input_ids)};".encode() + side.input_ids.tobytes() + side.targets.tobytes())
        return digest.hexdigest()

    def pairs_of(self, numbers: Sequence[int]) -> list[int]:
        """The pairs in the rows of these numbers, in the order in which a batch numbers them."""
        return [pair for number in numbers if number < len(self._rows) for pair in self._rows[number]]

    def in_order(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """Every pair once, in batches of one shape, with the pairs of each; the last is filled up with padding."""
        for first in range(0, len(self), batch_size):
            numbers = range(first, first + batch_size)
            yield self.pairs_of(numbers), self.batch(numbers)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of these numbers; a number past the last row gives padding."""
        rows = [self._rows[number] if number < len(self._rows) else [] for number in numbers]
        packed = pack_pairs([[self.pairs[index] for index in row] for row in rows], self._length, self._pad_id)
        return replace(packed, reference=torch.from_numpy(self.reference[self.pairs_of(numbers)]))


def pack_pairs(rows: Sequence[Sequence[Pair]], length: int, pad_id: int) -> Batch:
    """A batch of rows that hold these pairs, each answer a document of its own; the reference knows nothing yet."""
    batch, answers = pack_documents([[side for pair in row for side in pair.sides] for row in rows], length, pad_id)
    reference = torch.zeros(sum(map(len, rows)), SIDES)
    return replace(batch, answers=torch.from_numpy(answers), reference=reference)


class PreferenceBatches:
    """Training batches of packed pairs; a `BatchSource`. Every row comes once an epoch, in a new order each."""

    def __init__(self, rows: PairRows, global_batch_size: int, seed: int) -> None:
        self._rows = rows
        self._batch_size = global_batch_size
        self._order = Mixture([len(rows)], [1.0], seed)
        self.fingerprint = rows.fingerprint

    def batch(self, step: int, rows: range) -> Batch:
        _, numbers = self._order.items(step * self._batch_size + np.asarray(rows))
        return self._rows.batch(numbers.tolist())


def _render_all(
    sources: Sequence[ChatSource], tokenizer: Tokenizer, sequence_length: int, report: Report
) -> list[Pair]:
    """The pairs of all sources both of whose sides fit into `sequence_length` tokens."""
    pairs = []
    for row in read_pairs(sources, report):
        try:
            chosen, rejected = _render(row.content, tokenizer)
        except UsageError as error:
            report.skip(str(error), row.where)
            continue
        if max(len(chosen.input_ids), len(rejected.input_ids)) > sequence_length:
            report.skip(f"a side longer than sequence_length={sequence_length}", row.where)
            continue
        if np.array_equal(chosen.targets, rejected.targets):
            report.skip("a preference pair whose sides are equal as tokens", row.where)
            continue
        if any((side.targets == IGNORE).all() for side in (chosen, rejected)):
            report.skip("the chat template marks nothing to train on", row.where)
            continue
        report.documents += 1
        report.text_bytes += sum(
            len((message["content"] or "").encode()) for side in (row.content.chosen, row.content.rejected)
            for message in side
        )  # fmt: skip
        pairs.append(Pair(chosen, rejected, row.hash, row.where))
    return pairs


def _render(pair: formats.Pair, tokenizer: Tokenizer) -> tuple[Side, Side]:
    given, _ = tokenizer.encode_chat(pair.prompt, tools=pair.tools)

    def side(answer: list[Message]) -> Side:
        ids, trained = render(Dialogue([*pair.prompt, *answer], pair.tools), tokenizer)
        if ids[: len(given)] != given:
            raise UsageError("the chat template renders a prompt otherwise when an answer follows")
        return Side(*next_tokens(ids, [False] * len(given) + trained[len(given) :]))

    return side(pair.chosen), side(pair.rejected)
