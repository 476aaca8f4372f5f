"""Conversations -> tokens with targets: what supervised fine-tuning trains on, before it is packed.

An answer is never cut. A conversation that is too long is left out and counted, or loses its oldest turns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.batches import next_tokens
from moe_lm.data.conversations import nothing_usable, read_dialogues, split_held_out
from moe_lm.data.formats import Dialogue
from moe_lm.text.files import Report
from moe_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation: input_ids and targets [tokens - 1] int32, IGNORE where the assistant does not speak.

    `hash` is that of its messages and decides on which side of the held-out split it falls; `source` is the number of
    the source that it comes from, `where` its place there.
    """

    input_ids: NDArray[np.int32]
    targets: NDArray[np.int32]
    hash: int
    source: int = 0
    where: str = ""


@dataclass(frozen=True)
class ChatData:
    """The two sides of the split, and what was read, shortened and skipped for both."""

    train: list[Conversation]
    validation: list[Conversation]
    report: Report


def read_chat(config: ChatDataConfig, tokenizer: Tokenizer) -> ChatData:
    """Read and render all conversations; those for validation come from sources of their own or out of `train`.

    Raises UsageError for a file that does not exist, when there is nothing to train on, also of one source that has a
    weight, and for a tokenizer without a chat template that can be trained on.
    """
    tokenizer.chat_template  # noqa: B018 (without one every conversation would be skipped)
    report = Report()
    settings = tokenizer, config.sequence_length, report, config.truncate == "left"
    train = read_conversations(config.train, *settings)
    validation = read_conversations(config.validation, *settings)
    train, held_out = split_held_out(train, config.validation_fraction)
    needed = range(len(config.train)) if config.weights else [None]
    for source in needed:
        if not any(source in (None, item.source) for item in train):
            raise nothing_usable(config.train if source is None else [config.train[source]], "conversation", report)
    return ChatData(train, validation + held_out, report)


def read_conversations(
    sources: Sequence[ChatSource], tokenizer: Tokenizer, sequence_length: int, report: Report, shorten: bool = False
) -> list[Conversation]:
    """The conversations of all sources that fit into `sequence_length` tokens, or with `shorten` can be made to."""
    conversations = []
    for row in read_dialogues(sources, report):
        try:
            found = _rendered(row.content, tokenizer, sequence_length, shorten)
        except UsageError as error:  # the template has no place for such a conversation
            report.skip(str(error), row.where)
            continue
        if found is None:
            report.skip(f"longer than sequence_length={sequence_length}", row.where)
            continue
        used, ids, trained = found
        if not any(trained[1:]):
            report.skip("the chat template marks nothing to train on", row.where)
            continue
        if len(used.messages) < len(row.content.messages):
            report.shorten(f"oldest turns dropped to fit into sequence_length={sequence_length}", row.where)
        report.documents += 1
        report.text_bytes += sum(len((message["content"] or "").encode()) for message in used.messages)
        conversations.append(Conversation(*next_tokens(ids, trained), row.hash, row.source, row.where))
    return conversations


def render(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """The ids of a conversation and which of them are trained on.

    Where a template ends an answer with the token that begins the next turn, the last answer gets it too. Raises
    UsageError when the template refuses the conversation.
    """
    ids, trained = tokenizer.encode_chat(dialogue.messages, tools=dialogue.tools)
    if trained[-1] and ids[-1] not in tokenizer.stop_ids:
        return [*ids, tokenizer.end_id], [*trained, True]
    return ids, trained


def _rendered(
    dialogue: Dialogue, tokenizer: Tokenizer, sequence_length: int, shorten: bool
) -> tuple[Dialogue, list[int], list[bool]] | None:
    """The conversation, or its longest end that fits, with its ids and which of them are trained on; None: neither."""
    ids, trained = render(dialogue, tokenizer)
    if len(ids) - 1 <= sequence_length:
        return dialogue, ids, trained
    ends = list(_ends(dialogue)) if shorten else []
    first = bisect_left(ends, True, key=lambda end: len(render(end, tokenizer)[0]) - 1 <= sequence_length)
    return (ends[first], *render(ends[first], tokenizer)) if first < len(ends) else None


def _ends(dialogue: Dialogue) -> Iterator[Dialogue]:
    """The conversation without its oldest turns, ever fewer: the system prompt, then from a later question on.

    An answer that is trained on comes after that question.
    """
    messages = dialogue.messages
    system = messages[:1] if messages[0]["role"] == "system" else []
    for number, message in enumerate(messages):
        asked_later = message["role"] == "user" and number > len(system)
        if asked_later and any(
            later["role"] == "assistant" and later.get("train", True) for later in messages[number:]
        ):
            yield Dialogue([*system, *messages[number:]], dialogue.tools)
