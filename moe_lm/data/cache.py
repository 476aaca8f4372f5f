"""Token files of a store, on the local disk: fetched whole when they are first read, for all ranks of a host.

They take up no more than a bound. A corpus that is larger is read by ranges in their place, and nothing of it is kept.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.common.integrity import Entry, kind_of
from moe_lm.data.stream import TokenFile

WHOLE, PART = ".bin", ".part"
ABANDONED_SECONDS = 3600.0  # after which a part that nobody finished may go
STREAMS = 16  # ranges on their way at once
ATTEMPTS = 5  # of another process that needs the room may each take away what was just fetched


class ShardCache:
    """Files of a store by the checksums of their content, `most_bytes` of them; those used least recently make room.

    Processes share the folder: one fetches a file, which appears whole and verified, and the others wait for it. A
    `corpus_bytes` beyond `most_bytes` would be fetched again and again, since windows come from all of it in random
    order: `keeps_files` is false then, and `ranges` reads what is asked for.
    """

    def __init__(self, most_bytes: int, corpus_bytes: int = 0, folder: Path | None = None) -> None:
        self.folder = folder or storage.cache_folder() / "shards"
        self.most_bytes = most_bytes
        self.keeps_files = corpus_bytes <= most_bytes

    def path(self, entry: Entry) -> Path:
        """Where a file of this content is, if it is here."""
        return self.folder / f"{entry[kind_of(entry)]}{WHOLE}"

    def fetch(self, place: storage.Place, entry: Entry) -> None:
        """Fetch a file unless it is here. Raises StorageError, MoeLmError for the disk here."""
        try:
            self._fetch(place, self.path(entry), entry)
        except OSError as error:
            raise MoeLmError(
                f"cannot keep {storage.text_of(place)} in {self.folder}: {error.strerror or error}; make room there, "
                "lower data.cache_bytes, or name another folder with MOE_LM_CACHE"
            ) from error

    @staticmethod
    def ranges(place: storage.Place, starts: Sequence[int], count: int, put: Callable[[int, bytes], object]) -> None:
        """`put` the number and content of each range of `count` bytes. Raises StorageError."""

        def one(item: tuple[int, int]) -> None:
            number, start = item
            content = storage.read_range(place, start, start + count)
            if len(content) != count:
                raise MoeLmError(
                    f"shard {storage.text_of(place)} ends before byte {start + count}: it was cut short after it was "
                    "opened; bring it back, or prepare its source again"
                )
            put(number, content)

        with ThreadPoolExecutor(min(STREAMS, len(starts) or 1)) as pool:
            for _ in pool.map(one, enumerate(starts)):
                pass

    def _fetch(self, place: storage.Place, path: Path, entry: Entry) -> None:
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(PART)
        with FileLock(path.with_suffix(".lock")):
            if path.exists():  # another process was first
                return
            with FileLock(self.folder / "room.lock"):
                self._make_room(entry["size"])
                with part.open("wb") as file:
                    file.truncate(entry["size"])  # is counted by whoever looks for room next
            try:
                storage.fetch(place, part, entry)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        found = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix in (WHOLE, PART):
                    status = path.stat()
                    found.append((status.st_mtime, path, status.st_size))
        total, now = sum(size for _, _, size in found), time.time()
        for used, path, size in sorted(found):
            if total + needed <= self.most_bytes:
                return
            if path.suffix == WHOLE or used < now - ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
                total -= size


@dataclass(frozen=True, eq=False)
class StoredTokenFile(TokenFile):
    """A token file of a store, read from its copy in the cache, or by ranges; `path` is its URL."""

    cache: ShardCache = field(kw_only=True)
    entry: Entry = field(kw_only=True)  # of the whole file

    @cached_property
    def _local(self) -> TokenFile:
        return TokenFile(self.cache.path(self.entry), self.dtype, self.size, self.offset)

    def _read(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        if not self.cache.keeps_files:
            return self._read_ranges(starts, length)
        for _ in range(ATTEMPTS):
            try:
                result = self._local._read(starts, length)
            except MoeLmError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
                self.cache.fetch(self.path, self.entry)
            else:
                with suppress(OSError):
                    os.utime(self._local.path)  # used now
                return result
        raise MoeLmError(
            f"{storage.text_of(self.path)} was fetched {ATTEMPTS} times and other processes took it away from "
            f"{self.cache.folder} each time; raise data.cache_bytes"
        )

    def _read_ranges(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        result = np.empty((len(starts), length), self.dtype)

        def put(row: int, content: bytes) -> None:
            result[row] = np.frombuffer(content, self.dtype)

        begins = [self.offset + start * self.dtype.itemsize for start in starts.tolist()]
        self.cache.ranges(self.path, begins, length * self.dtype.itemsize, put)
        return result


def token_file(
    path: Path,
    dtype: np.dtype[Any],
    size: int,
    offset: int,
    vocab_size: int | None,
    cache: ShardCache | None,
    checksum: Entry | None,
) -> TokenFile:
    """A token file, here or in a store; there it is read by ranges without a cache, or a checksum of the whole file."""
    if not storage.is_remote(path):
        return TokenFile(path, dtype, size, offset, vocab_size)
    if cache is None or checksum is None:
        cache = ShardCache(most_bytes=0, corpus_bytes=1)
    entry = {"size": size * dtype.itemsize, **(checksum or {})}
    return StoredTokenFile(path, dtype, size, offset, vocab_size, cache=cache, entry=entry)
