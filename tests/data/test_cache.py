"""Token files of a store on the local disk: whole and verified, within a bound, once for all processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.common.integrity import entry_of_bytes
from moe_lm.common.storage import DamagedError
from moe_lm.data.cache import ShardCache, StoredTokenFile

FILES = {f"memory://shards/{name}": bytes([number]) * 1000 for number, name in enumerate("abcd")}
A, B, C, D = FILES


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was fetched from a store with four files of 1,000 bytes."""
    real, places = storage.fetch, list[str]()

    def fetch(place: str, *more: Any) -> None:
        places.append(storage.text_of(place))
        real(place, *more)

    for place, content in FILES.items():
        storage.write_bytes(place, content)
    monkeypatch.setattr(storage, "fetch", fetch)
    yield places
    MemoryFileSystem.store.clear()


def file_of(cache: ShardCache, place: str) -> StoredTokenFile:
    entry = entry_of_bytes(FILES[place])
    return StoredTokenFile(Path(place), np.dtype("<u2"), 500, cache=cache, entry=entry)


def read(cache: ShardCache, place: str) -> bytes:
    return file_of(cache, place)[:].tobytes()


def test_a_file_is_fetched_once_and_what_was_used_least_recently_makes_room(fetched: list[str], tmp_path: Path) -> None:
    cache = ShardCache(2500, folder=tmp_path)
    for place in (A, B, A, C, A, B, D):
        assert read(cache, place) == FILES[place]
        assert sum(path.stat().st_size for path in tmp_path.glob("*.[bp]*")) <= 2500
    assert fetched == [A, B, C, B, D]


def test_a_file_that_is_larger_than_the_bound_is_read_all_the_same(fetched: list[str], tmp_path: Path) -> None:
    cache = ShardCache(500, folder=tmp_path)
    assert [read(cache, place) for place in (A, A, B)] == [FILES[A], FILES[A], FILES[B]]
    assert fetched == [A, B]


def test_threads_that_want_the_same_file_fetch_it_once(fetched: list[str], tmp_path: Path) -> None:
    contents: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: contents.append(read(ShardCache(9000, folder=tmp_path), A))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert contents == [FILES[A]] * 4
    assert fetched == [A]


def test_a_damaged_file_is_never_kept(fetched: list[str], tmp_path: Path) -> None:
    cache = ShardCache(9000, folder=tmp_path)
    storage.write_bytes(A, b"\1" * 1000)
    with pytest.raises(DamagedError, match="memory://shards/a does not have the checksum"):
        read(cache, A)
    assert not list(tmp_path.glob("*.[bp]*"))
    storage.write_bytes(A, FILES[A])
    assert read(cache, A) == FILES[A]


def test_what_a_killed_process_left_goes_after_an_hour(fetched: list[str], tmp_path: Path) -> None:
    cache, left = ShardCache(1500, folder=tmp_path), tmp_path / "other.part"
    left.write_bytes(b"x" * 800)
    read(cache, A)
    assert left.exists()
    os.utime(left, (0, 0))
    read(cache, B)
    assert not left.exists()


def test_of_a_corpus_beyond_the_bound_ranges_are_read_and_nothing_is_kept(fetched: list[str], tmp_path: Path) -> None:
    cache = ShardCache(3000, corpus_bytes=4000, folder=tmp_path)
    assert not cache.keeps_files
    assert file_of(cache, B).windows(np.array([0, 495, 3]), 5).tolist() == [[0x0101] * 5] * 3
    with pytest.raises(MoeLmError, match="shard memory://shards/b ends before byte 1010: it was cut short"):
        StoredTokenFile(Path(B), np.dtype("<u2"), 900, cache=cache, entry={}).windows(np.array([500]), 5)
    assert ShardCache(4000, corpus_bytes=4000).keeps_files
    assert fetched == []
    assert not list(tmp_path.iterdir())
