"""A piece of a source: read, tokenized and written as shards, with a record of what is in them.

The shards of piece N are `train-N` and `validation-N`. Its record is written last, so that a piece with a record is
whole. What is written depends on the source and the tokenizer alone: two processes may write the same piece.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import whole_file
from moe_lm.common.integrity import XXH3, Hashed
from moe_lm.config.section import Section
from moe_lm.data.crew import PiecesJob, Tell
from moe_lm.data.duplicates import Marks
from moe_lm.data.shards import INDEX_DTYPE, Shard, Split, token_dtype
from moe_lm.text.files import Report
from moe_lm.text.pieces import check_unchanged, stamps_of
from moe_lm.text.sources import Document, read_documents
from moe_lm.text.split import document_hash
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tokenizer.words import Words

BATCH_CHARS = 1 << 20  # of text that are tokenized together


@dataclass(frozen=True)
class Task(PiecesJob):
    """The job that tokenizes a source."""

    tokenizer: Path
    fingerprint: str
    folder: Path  # of the shards
    held_out_below: int  # the hashes of documents that are held out
    marks: Marks | None = None  # the duplicates, which are left out

    def text_bytes(self, number: int) -> int:
        return Record.model_validate_json(self.record_path(number).read_bytes()).text_bytes

    def do(self, number: int, tell: Tell, is_mine: Callable[[], bool]) -> None:
        write_piece(self, number, tell, is_mine=is_mine)


class Record(Section):
    """What a piece holds, and for what it was written."""

    held_out_below: int
    max_bytes: int | None
    documents: int
    text_bytes: int  # with those of duplicates
    lowest_hash: int | None
    rows: int
    train: Shard | None
    validation: Shard | None
    skipped: dict[str, int]
    examples: dict[str, str]
    files: dict[str, tuple[int, int]]  # size and time of change of what was read


def read_record(task: Task, number: int) -> Record | None:
    """The record of a piece; None if it is not done, or its files or its shards are others now."""
    try:
        record = Record.model_validate_json(task.record_path(number).read_bytes())
        shards = [shard for shard in (record.train, record.validation) if shard is not None]
        size = np.dtype(token_dtype(_tokenizer(task.tokenizer, task.fingerprint)[0].vocab_size)).itemsize
        whole = all(shard.path(task.folder).stat().st_size == shard.tokens * size for shard in shards)
    except (OSError, ValidationError):
        return None
    return record if whole and record.files == stamps_of(task.pieces[number]) else None


def write_piece(
    task: Task,
    number: int,
    tell: Tell = lambda done: None,
    held_out_below: int | None = None,
    max_bytes: int | None = None,
    is_mine: Callable[[], bool] = lambda: True,
    name: int | None = None,
) -> Record | None:
    """Write the shards of a piece and its record; None and nothing is left if it `is_mine` no more in the end.

    `name` is the number in the names of the shards, if it is another. Raises MoeLmError for a file that changed.
    """
    piece, report = task.pieces[number], Report()
    limit = task.held_out_below if held_out_below is None else held_out_below
    max_bytes = task.source.max_bytes if max_bytes is None else max_bytes
    tokenizer, words = _tokenizer(task.tokenizer, task.fingerprint)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size))
    bos, eos = (np.array(id_, dtype).tobytes() for id_ in (tokenizer.bos_id, tokenizer.eos_id))
    before, lowest, shards = stamps_of(piece), None, dict[str, Shard | None]()
    duplicates = task.marks.of(number) if task.marks is not None else frozenset[int]()
    name = number if name is None else name
    with suppress(_TakenOverError), ExitStack() as stack:
        writers = {split: _Writer(task.folder, split, name, dtype, stack) for split in ("train", "validation")}
        for batch in _batches(read_documents(task.source, report, piece, max_bytes, duplicates)):
            done = 0
            for document, ids in zip(batch, words.encode([document.text for document in batch]), strict=True):
                hash_ = document_hash(document.id)
                lowest = hash_ if lowest is None else min(lowest, hash_)
                size = len(document.text.encode())
                writers["validation" if hash_ < limit else "train"].add(bos + ids + eos, size)
                done += size
            tell(done)
        check_unchanged(piece, before)
        if not is_mine():
            raise _TakenOverError
        shards = {split: writer.close() for split, writer in writers.items()}
    if not shards:
        return None
    record = Record(
        held_out_below=limit,
        max_bytes=max_bytes,
        documents=report.documents,
        text_bytes=report.text_bytes,
        lowest_hash=lowest,
        rows=report.rows,
        skipped=report.skipped,
        examples=report.examples,
        files=before,
        train=shards["train"],
        validation=shards["validation"],
    )
    with whole_file(task.record_path(number), contested=True) as file:
        file.write_text(record.model_dump_json(), encoding="utf-8")
    return record


def joined(task: Task, records: Sequence[Record], report: Report) -> Report:
    """The counts of all pieces; places in a range of a file are those in the file."""
    before: dict[tuple[str, Path], int] = {}
    for piece, record in zip(task.pieces, records, strict=False):
        report.documents += record.documents
        report.text_bytes += record.text_bytes
        first = piece[0]
        rows = before.get((first.name, first.path), 0) if first.stop is not None else 0
        for reason, count in record.skipped.items():
            report.skipped[reason] = report.skipped.get(reason, 0) + count
            report.examples.setdefault(reason, _moved(record.examples[reason], first.name, rows))
        before[first.name, first.path] = rows + record.rows
    return report


def _moved(where: str, name: str, rows: int) -> str:
    return re.sub(rf"(?<=^{re.escape(name)}:)\d+", lambda found: str(int(found[0]) + rows), where) if rows else where


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _TakenOverError(Exception):
    """Another process writes the piece, or has written it."""


@cache
def _tokenizer(path: Path, fingerprint: str) -> tuple[Tokenizer, Words]:
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise MoeLmError(f"tokenizer {path} was replaced while prepare was running; run prepare again")
    return tokenizer, Words(tokenizer, token_dtype(tokenizer.vocab_size))


class _Writer:
    """Writes the shard of a piece and split, from its first document on."""

    def __init__(self, folder: Path, split: Split, number: int, dtype: np.dtype[Any], stack: ExitStack) -> None:
        self._path, self._name = folder / f"{split}-{number:05d}.bin", f"{split}-{number:05d}"
        self._dtype, self._stack = dtype, stack
        self._tokens: Hashed | None = None
        self._index = array("q")  # a list of pairs takes eight times the memory

    def add(self, ids: bytes, text_bytes: int) -> None:
        if self._tokens is None:
            # The path is open before the file, so that it is renamed after the file is closed.
            path = self._stack.enter_context(whole_file(self._path, contested=True))
            self._tokens = Hashed(self._stack.enter_context(path.open("wb")))
        self._tokens.write(ids)
        self._index.extend((len(ids) // self._dtype.itemsize, text_bytes))

    def close(self) -> Shard | None:
        if self._tokens is None:
            self._path.unlink(missing_ok=True)  # of what was written for another split
            self._path.with_suffix(".index").unlink(missing_ok=True)
            return None
        index = np.array(self._index, INDEX_DTYPE).reshape(-1, 2)
        with whole_file(self._path.with_suffix(".index"), contested=True) as path, path.open("wb") as file:
            hashed = Hashed(file)
            hashed.write(index.tobytes())
        return Shard(
            name=self._name,
            tokens=int(index[:, 0].sum()),
            documents=len(index),
            text_bytes=int(index[:, 1].sum()),
            xxh3_128=self._tokens.entry[XXH3],
            index_xxh3_128=hashed.entry[XXH3],
        )
