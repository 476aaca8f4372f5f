"""Chunks: documents tokenized by several processes into numbered files.

The documents of a source are divided into chunks by size only. Each chunk's file is named after its number and a hash
of its documents, and appears whole under that name, so that a second run finds the chunks that the first one finished.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Self

import numpy as np

from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import whole_file
from moe_lm.data.shards import INDEX_DTYPE, token_dtype
from moe_lm.text.sources import Document
from moe_lm.text.split import document_hash
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tokenizer.words import Words

CHUNK_BYTES = 1 << 20  # of text; later chunks of a large source are larger, which keeps the number of files low

Chunk = tuple[Path, int]  # the file of a finished chunk, and the bytes of its text


def write_chunks(
    documents: Iterable[Document], tokenizer_path: Path, fingerprint: str, folder: Path, workers: Workers
) -> Iterator[Chunk]:
    """Tokenize documents into chunk files, in order. Files that are in the folder already are not written again.

    A file holds `tokens`, `index` [documents, 2] (tokens, bytes of text) and the `hashes` of the documents' ids.
    """
    pending: deque[Future[Chunk]] = deque()
    for number, chunk in enumerate(_divide(documents)):
        path = folder / f"{number:06d}-{_chunk_hash(chunk)}.npz"
        pending.append(workers.submit(_write_chunk, path, chunk, tokenizer_path, fingerprint))
        if len(pending) > 2 * workers.count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class Workers:
    """The processes that tokenize, started with the first chunk. With one worker this process does all the work."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Spawned, not forked: the tokenizers library has threads, and a lock that they hold stays locked in a fork.
        self._pool = ProcessPoolExecutor(count, get_context("spawn"), _begin_worker) if count > 1 else None

    def submit(self, function: Callable[..., Chunk], *arguments: Any) -> Future[Chunk]:
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[Chunk] = Future()
        future.set_result(function(*arguments))
        return future

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise MoeLmError(
                "a process of prepare was killed, perhaps because memory ran out; run the same command again to go on, "
                "with fewer data.workers if it happens again"
            ) from error


def _divide(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = number = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES * min(16, 1 + number // 64):
            yield chunk
            chunk, size, number = [], 0, number + 1
    if chunk:
        yield chunk


def _write_chunk(path: Path, documents: list[Document], tokenizer_path: Path, fingerprint: str) -> Chunk:
    try:
        with np.load(path) as file:
            index = file["index"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # missing, or damaged
        tokenizer, words = _tokenizer(tokenizer_path, fingerprint)
        dtype = np.dtype(token_dtype(tokenizer.vocab_size))
        bos, eos = (np.array(id_, dtype).tobytes() for id_ in (tokenizer.bos_id, tokenizer.eos_id))
        framed = [bos + ids + eos for ids in words.encode([document.text for document in documents])]
        bytes_of_ids = dtype.itemsize
        sizes = [
            (len(ids) // bytes_of_ids, len(item.text.encode())) for ids, item in zip(framed, documents, strict=True)
        ]
        index = np.array(sizes, INDEX_DTYPE)
        hashes = np.array([document_hash(document.id) for document in documents], np.uint64)
        with whole_file(path) as unfinished, unfinished.open("wb") as file:  # given a name, savez appends .npz
            np.savez(file, tokens=np.frombuffer(b"".join(framed), dtype), index=index, hashes=hashes)
    return path, int(index[:, 1].sum())


@cache
def _tokenizer(path: Path, fingerprint: str) -> tuple[Tokenizer, Words]:
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != fingerprint:
        raise MoeLmError(f"tokenizer {path} was replaced while prepare was running; run prepare again")
    return tokenizer, Words(tokenizer, token_dtype(tokenizer.vocab_size))


def _chunk_hash(documents: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        for data in (document.id.encode("utf-8"), document.text.encode("utf-8")):
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _begin_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each: the processes are the parallelism
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal's reach every process; the parent ends this one
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a parent that was killed cannot stop its workers, and they would wait for chunks forever
