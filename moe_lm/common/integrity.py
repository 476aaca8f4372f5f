"""Size and checksum of files, as manifests keep them.

What is written now has xxh3-128, which runs as fast as memory is read; older manifests have SHA-256. They find damage,
and no forgery: who can write a file can write its manifest too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

XXH3, SHA256 = "xxh3_128", "sha256"
KINDS: dict[str, Callable[..., Any]] = {XXH3: xxhash.xxh3_128, SHA256: hashlib.sha256}
CHUNK_BYTES = 1 << 18  # hashed and written while they are in the processor's cache

Entry = dict[str, Any]  # a file's line in a manifest: `size` in bytes, and a checksum under its kind


class Hashed:
    """Writes to a file and hashes what it is given, so that damage on the way to the file does not go unnoticed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._digest = file, 0, KINDS[XXH3]()

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content)
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._digest.update(chunk)
            self._file.write(chunk)
        self._size += len(view)
        return len(view)

    @property
    def entry(self) -> Entry:
        """The line of what has been written."""
        return {"size": self._size, XXH3: self._digest.hexdigest()}


def entry_of(path: Path) -> Entry:
    """The line of a file as it is on the disk."""
    return {"size": path.stat().st_size, XXH3: checksum_of(path)}


def entry_of_bytes(content: bytes) -> Entry:
    """The line of a file with this content."""
    return {"size": len(content), XXH3: KINDS[XXH3](content).hexdigest()}


def checksum_of(path: Path, kind: str = XXH3) -> str:
    """The checksum of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return str(hashlib.file_digest(file, KINDS[kind]).hexdigest())


def kind_of(entry: Mapping[str, Any]) -> str:
    """The kind of checksum in a line. Raises KeyError for a line without a known one."""
    if kind := next((kind for kind in KINDS if kind in entry), None):
        return kind
    raise KeyError(f"none of {', '.join(KINDS)}")


def damage_in(path: Path, entry: Mapping[str, Any]) -> str | None:
    """How a file differs from its line; None if it does not. Raises KeyError for a line without a known checksum."""
    kind = kind_of(entry)
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != entry["size"]:
        return f"has {size} bytes, expected {entry['size']}"
    if checksum_of(path, kind) != entry[kind]:
        return "does not have the checksum that the manifest gives"
    return None
