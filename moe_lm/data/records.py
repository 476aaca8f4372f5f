"""Conversations and preferences from files and data sets, each with its place and the hash that decides its split."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from moe_lm.common import storage
from moe_lm.common.errors import UsageError
from moe_lm.config.data import ChatDataConfig, ChatSource
from moe_lm.data.formats import Dialogue, Message, Preference, Unusable, dialogue_of, preference_of
from moe_lm.text.files import Report, Rows, read_rows
from moe_lm.text.sources import read_dataset
from moe_lm.text.split import document_hash, held_out_of
from moe_lm.tokenizer.tokenizer import Tokenizer

ContentT = TypeVar("ContentT", Dialogue, Preference)


@dataclass(frozen=True)
class Record(Generic[ContentT]):
    """A usable row: its content, its place (like `a.jsonl:7`) and the number of its source.

    `hash` is that of a dialogue's messages, or of a preference's prompt; it decides the split.
    """

    content: ContentT
    where: str
    source: int
    hash: int


def read_dialogues(sources: Sequence[ChatSource], report: Report) -> Iterator[Record[Dialogue]]:
    """The conversations of all sources in order. A row without one is counted by reason and stops nothing.

    Raises UsageError for a file that does not exist, MoeLmError for a data set that cannot be read.
    """
    return _read(sources, report, dialogue_of, lambda dialogue: _hash(dialogue.messages))


def read_preferences(sources: Sequence[ChatSource], report: Report) -> Iterator[Record[Preference]]:
    """The preferences of all sources in order. Those with the same prompt have the same hash, and so the same split."""
    return _read(sources, report, preference_of, lambda preference: _hash(preference.prompt))


class Hashed(Protocol):
    @property
    def hash(self) -> int: ...


HashedT = TypeVar("HashedT", bound=Hashed)


@dataclass(frozen=True)
class Splits(Generic[HashedT]):
    """The tokenized items of both splits, and the counts of what was read, shortened and skipped for both."""

    train: list[HashedT]
    validation: list[HashedT]
    report: Report


def read_splits(
    config: ChatDataConfig,
    tokenizer: Tokenizer,
    kind: str,
    read: Callable[[Sequence[ChatSource], Report], list[HashedT]],
) -> Splits[HashedT]:
    """`read` for both splits. Items for validation have sources of their own or are held out of `train`, by their hash.

    Raises UsageError for a file that does not exist, when there is nothing to train on, and for a tokenizer without a
    chat template that can be trained on.
    """
    tokenizer.chat_format  # noqa: B018 (without one every item would be skipped)
    report = Report()
    items, validation = read(config.train, report), read(config.validation, report)
    held = held_out_of(np.array([item.hash for item in items], np.uint64), config.validation_fraction).tolist()
    train = [item for item, is_held in zip(items, held, strict=True) if not is_held]
    validation += [item for item, is_held in zip(items, held, strict=True) if is_held]
    if not train:
        raise nothing_usable(config.train, kind, report)
    return Splits(train, validation, report)


def nothing_usable(sources: Sequence[ChatSource], kind: str, report: Report) -> UsageError:
    """The error for sources that hold nothing to train on."""
    reasons = "; ".join(report.skipped_lines()) or "the files are empty, or validation_fraction holds all of it out"
    return UsageError(f"data.train={', '.join(item.origin for item in sources)} has no usable {kind}: {reasons}")


def _read(
    sources: Sequence[ChatSource],
    report: Report,
    content_of: Callable[[dict[str, Any], ChatSource], ContentT],
    hash_of: Callable[[ContentT], int],
) -> Iterator[Record[ContentT]]:
    for number, source in enumerate(sources):
        for where, row in _rows(source, report):
            try:
                content = content_of(row, source)
                content_hash = hash_of(content)
            except Unusable as problem:
                report.skip(str(problem), where)
            except RecursionError:
                report.skip("objects nested too deeply", where)
            else:
                yield Record(content, where, number, content_hash)


def _rows(source: ChatSource, report: Report) -> Rows:
    if source.dataset is not None:
        yield from read_dataset(source.dataset, source.subset, source.split, "data")
        return
    paths = _files_of(source.path or "")
    if not paths:
        raise UsageError(
            f"conversations {source.path} do not exist; expected a .json, .jsonl or .parquet file (.gz, .xz, .zst)"
        )
    for path in paths:
        yield from read_rows(path, path.name, report)


def _files_of(place: str) -> list[Path]:
    """The file of this path or URL, or those that a glob takes."""
    if storage.is_remote(place):
        found = storage.glob(place) if storage.has_magic(place) else storage.find(place)
        return [Path(file.url) for file in found]
    pattern = Path(place).expanduser()
    paths = [pattern] if pattern.is_file() else sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))
    return [path for path in paths if path.is_file()]


def _hash(messages: Sequence[Message]) -> int:
    """Equal for equal messages, masked or not. Fields other than role and content are hashed too, when present."""
    parts = []
    for message in messages:
        further = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
        parts += [message["role"], message["content"] or ""]
        parts += [json.dumps(further, sort_keys=True)] if further else []
    return document_hash("\0".join(parts))
