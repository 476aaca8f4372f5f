"""Preferences -> pairs of examples -> packed rows, each with both answers of its pairs.

Any slice of the global batch, a rank's or a micro-batch, therefore holds whole pairs, and every layout computes the
same loss. A row has room for two sequences: a pair fits when each of its sides, prompt with answer, fits into one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.examples import tokenize
from moe_lm.data.formats import Dialogue, Message, Preference
from moe_lm.data.packing import Example, PackedRows, next_tokens, pack_examples
from moe_lm.data.records import Splits, read_preferences, read_splits
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer

SIDES = 2  # of a pair: the chosen one first


@dataclass(frozen=True)
class Pair:
    """A tokenized preference: on each side prompt and answer, in int32, IGNORE on the prompt.

    `hash` is that of the prompt and decides the pair's split; `where` is its place in its source.
    """

    chosen: Example
    rejected: Example
    hash: int
    where: str = ""

    @property
    def sides(self) -> tuple[Example, Example]:
        return self.chosen, self.rejected

    @property
    def num_tokens(self) -> int:
        return sum(len(side.input_ids) for side in self.sides)


def read_pairs(config: ChatDataConfig, tokenizer: Tokenizer) -> Splits[Pair]:
    """All preferences as pairs. Raises UsageError as `read_splits`."""

    def read(sources: Sequence[ChatSource], report: Report) -> list[Pair]:
        return _tokenize_all(sources, tokenizer, config.sequence_length, report)

    return read_splits(config, tokenizer, "preference pair", read)


class PairRows(PackedRows):
    """Pairs packed into rows of `2 * sequence_length` tokens.

    reference: [pairs, 2] float32, the reference model's log-probability of each answer, zero until it is known.
    """

    def __init__(self, pairs: Sequence[Pair], sequence_length: int, pad_id: int) -> None:
        self._length = SIDES * sequence_length
        super().__init__([pair.num_tokens for pair in pairs], self._length)
        self.pairs = pairs
        self.reference = np.zeros((len(pairs), SIDES), np.float32)
        self._pad_id = pad_id

    def set_reference(self, log_probs: NDArray[np.float32]) -> None:
        """Give the batches the reference model's log-probabilities."""
        self.reference = log_probs

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self._length},{len(self.pairs)}".encode())
        for pair in self.pairs:
            for side in pair.sides:
                digest.update(f";{len(side.input_ids)};".encode() + side.input_ids.tobytes() + side.targets.tobytes())
        return digest.hexdigest()

    def batch(self, numbers: Sequence[int]) -> Batch:
        rows = self.items_in(numbers)
        packed = pack_pairs([[self.pairs[index] for index in row] for row in rows], self._length, self._pad_id)
        return replace(packed, reference=torch.from_numpy(self.reference[[index for row in rows for index in row]]))


def pack_pairs(rows: Sequence[Sequence[Pair]], length: int, pad_id: int) -> Batch:
    """A batch of rows of pairs. Each side is an attention segment of its own; the reference is zero."""
    batch, answers = pack_examples([[side for pair in row for side in pair.sides] for row in rows], length, pad_id)
    reference = torch.zeros(sum(map(len, rows)), SIDES)
    return replace(batch, answers=torch.from_numpy(answers), reference=reference)


def _tokenize_all(
    sources: Sequence[ChatSource], tokenizer: Tokenizer, sequence_length: int, report: Report
) -> list[Pair]:
    """The pairs of all sources whose sides both fit into `sequence_length` tokens."""
    pairs = []
    for record in read_preferences(sources, report):
        try:
            chosen, rejected = _sides(record.content, tokenizer)
        except UsageError as error:
            report.skip(str(error), record.where)
            continue
        if max(len(chosen.input_ids), len(rejected.input_ids)) > sequence_length:
            report.skip(f"a side longer than sequence_length={sequence_length}", record.where)
            continue
        if np.array_equal(chosen.targets, rejected.targets):
            report.skip("a preference pair whose sides are equal as tokens", record.where)
            continue
        if any((side.targets == IGNORE).all() for side in (chosen, rejected)):
            report.skip("the chat template marks nothing to train on", record.where)
            continue
        report.documents += 1
        answers = record.content.chosen + record.content.rejected
        report.text_bytes += sum(len((message["content"] or "").encode()) for message in answers)
        pairs.append(Pair(chosen, rejected, record.hash, record.where))
    return pairs


def _sides(preference: Preference, tokenizer: Tokenizer) -> tuple[Example, Example]:
    prompt_ids, _ = tokenizer.encode_chat(preference.prompt, tools=preference.tools)

    def side(answer: list[Message]) -> Example:
        ids, trained = tokenize(Dialogue([*preference.prompt, *answer], preference.tools), tokenizer)
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UsageError("the chat template writes a prompt differently when an answer follows")
        return Example(*next_tokens(ids, [False] * len(prompt_ids) + trained[len(prompt_ids) :]))

    return side(preference.chosen), side(preference.rejected)
