"""Conversations -> training examples -> packed rows: what supervised fine-tuning trains on.

Only the assistant's words are targets. An answer is never cut: a conversation that is too long is left out and
counted, or loses its oldest turns.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import Batch
from moe_lm.data.formats import Dialogue
from moe_lm.data.packing import Example, PackedRows, next_tokens, pack_examples
from moe_lm.data.records import Splits, nothing_usable, read_dialogues, read_splits
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatExample(Example):
    """A tokenized conversation, in int32; IGNORE where the assistant does not speak.

    `hash` is that of its messages and decides its split; `source` is the number of its source, `where` its place there.
    """

    hash: int
    source: int = 0
    where: str = ""


def read_chat(config: ChatDataConfig, tokenizer: Tokenizer) -> Splits[ChatExample]:
    """All conversations as examples. Raises UsageError as `read_splits`, and when a source with a weight has none."""

    def read(sources: Sequence[ChatSource], report: Report) -> list[ChatExample]:
        return read_examples(sources, tokenizer, config.sequence_length, report, config.truncate == "left")

    data = read_splits(config, tokenizer, "conversation", read)
    for number, source in enumerate(config.train):
        if source.weight is not None and not any(item.source == number for item in data.train):
            raise nothing_usable([source], "conversation", data.report)
    return data


def read_examples(
    sources: Sequence[ChatSource], tokenizer: Tokenizer, sequence_length: int, report: Report, shorten: bool = False
) -> list[ChatExample]:
    """The conversations of all sources that fit into `sequence_length` tokens, or with `shorten` can be made to fit."""
    examples = []
    for record in read_dialogues(sources, report):
        try:
            found = _fitting(record.content, tokenizer, sequence_length, shorten)
        except UsageError as error:  # the template has no place for such a conversation
            report.skip(str(error), record.where)
            continue
        if found is None:
            report.skip(f"longer than sequence_length={sequence_length}", record.where)
            continue
        used, ids, trained = found
        if not any(trained[1:]):
            report.skip("the chat template marks nothing to train on", record.where)
            continue
        if len(used.messages) < len(record.content.messages):
            report.shorten(f"oldest turns dropped to fit into sequence_length={sequence_length}", record.where)
        report.documents += 1
        report.text_bytes += sum(len((message["content"] or "").encode()) for message in used.messages)
        examples.append(ChatExample(*next_tokens(ids, trained), record.hash, record.source, record.where))
    return examples


def tokenize(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids of a conversation and for each whether it is trained on.

    Where a template ends an answer with the token that begins the next turn, that token is added after the last
    answer. Raises UsageError when the template refuses the conversation.
    """
    ids, trained = tokenizer.encode_chat(dialogue.messages, tools=dialogue.tools)
    if trained[-1] and ids[-1] not in tokenizer.stop_ids:
        return [*ids, tokenizer.end_id], [*trained, True]
    return ids, trained


def _fitting(
    dialogue: Dialogue, tokenizer: Tokenizer, sequence_length: int, shorten: bool
) -> tuple[Dialogue, list[int], list[bool]] | None:
    """The conversation, or its longest ending that fits, with its ids and mask; None when neither fits."""
    ids, trained = tokenize(dialogue, tokenizer)
    if len(ids) - 1 <= sequence_length:
        return dialogue, ids, trained
    endings = list(_endings(dialogue)) if shorten else []
    first = bisect_left(endings, True, key=lambda ending: len(tokenize(ending, tokenizer)[0]) - 1 <= sequence_length)
    return (endings[first], *tokenize(endings[first], tokenizer)) if first < len(endings) else None


def _endings(dialogue: Dialogue) -> Iterator[Dialogue]:
    """The conversation shorter each time: the system prompt, then all from a later question with a trained answer."""
    messages = dialogue.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    for number, message in enumerate(messages):
        rest = messages[number:]
        is_answered = any(later["role"] == "assistant" and later.get("train", True) for later in rest)
        if message["role"] == "user" and number > len(system) and is_answered:
            yield Dialogue([*system, *rest], dialogue.tools)


class ExampleRows(PackedRows):
    """Examples packed into rows of `sequence_length` tokens; with `by_source` no row mixes sources."""

    def __init__(
        self,
        examples: Sequence[ChatExample],
        sequence_length: int,
        pad_id: int,
        separate_documents: bool = True,
        by_source: bool = False,
    ) -> None:
        sources = [item.source for item in examples] if by_source else []
        super().__init__([len(item.input_ids) for item in examples], sequence_length, sources)
        self._examples = examples
        self._length = sequence_length
        self._pad_id = pad_id
        self._separate = separate_documents

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for item in self._examples:
            digest.update(b"%d %d," % (item.source, len(item.input_ids)) + item.input_ids.tobytes())
            digest.update(item.targets.tobytes())
        return digest.hexdigest()

    def batch(self, numbers: Sequence[int]) -> Batch:
        rows = [[self._examples[index] for index in row] for row in self.items_in(numbers)]
        return pack_examples(rows, self._length, self._pad_id, self._separate)[0]
