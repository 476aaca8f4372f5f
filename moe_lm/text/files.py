"""Lines and rows of files that may be compressed and may be broken; memory is bounded whatever their size.

One bad line never stops a file: what cannot be used is counted in a `Report` by reason, with the first place where
it was met.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from moe_lm.common.errors import UsageError

try:
    import zstandard
except ImportError:
    zstandard = None  # type: ignore[assignment]

MAX_LINE_BYTES = 16 << 20  # a longer line is skipped: it would have to be held in memory whole
MAX_JSON_BYTES = 128 << 20  # a .json array is parsed whole; beyond this it has to be .jsonl
COMPRESSED_SUFFIXES = frozenset({".gz", ".xz", ".zst"})
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
if zstandard is not None:
    UNREADABLE += (zstandard.ZstdError,)


@dataclass
class Report:
    """What was read and what was left out or shortened: counts by reason, and for each reason the first place."""

    documents: int = 0
    text_bytes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    def shorten(self, reason: str, where: str) -> None:
        """Count what is used, but not whole."""
        self.shortened[reason] = self.shortened.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    def skipped_lines(self) -> list[str]:
        """One line a reason, like `3 skipped: invalid UTF-8 (first: a.txt:7)`."""
        return [
            f"{count} {what}: {reason} (first: {self.examples[reason]})"
            for what, counts in (("skipped", self.skipped), ("shortened", self.shortened))
            for reason, count in counts.items()
        ]


def kind_of(path: Path) -> str:
    """The suffix under any compression suffix, in lower case: `.jsonl` for `a.JSONL.xz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_decompressed(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed when its name ends in .gz, .xz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstandardFile(path), 1 << 16))
    return open(path, "rb")


def read_rows(path: Path, name: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .jsonl, .json or .parquet file (compressed or not), each with its place, like `a.jsonl:7`."""
    if kind_of(path) == ".parquet":
        yield from _parquet_rows(path, name, report)
        return
    try:
        with open_decompressed(path) as file:
            rows = _json_values(file, name, report) if kind_of(path) == ".json" else _json_lines(file, name, report)
            for where, row in rows:
                if isinstance(row, dict):
                    yield where, row
                else:
                    report.skip("row is not an object", where)
    except UNREADABLE as error:
        report.skip("unreadable file", f"{name}: {error}")


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`; Parquet begins with its end, so a compressed one is unpacked into a file."""
    import pyarrow.parquet

    with open_decompressed(path) as stream, tempfile.TemporaryFile() as seekable:
        file: BinaryIO = stream
        if path.suffix.lower() in COMPRESSED_SUFFIXES:
            shutil.copyfileobj(stream, seekable)
            file = cast(BinaryIO, seekable)
        yield pyarrow.parquet.ParquetFile(file)


def text_problem(text: str) -> str | None:
    """Why a text must not reach the tokenizer, or None."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "invalid UTF-8"
    return None


def read_lines(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, counted from 1; one over MAX_LINE_BYTES is passed over without being held."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            report.skip(f"line over {MAX_LINE_BYTES >> 20} MiB", f"{name}:{number}")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            continue
        yield number, line


def _parquet_rows(path: Path, name: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow

    try:
        with open_parquet(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=256):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        [row] = batch.slice(index, 1).to_pylist()
                    except UnicodeDecodeError:
                        report.skip("invalid UTF-8", f"{name}:{number}")
                        continue
                    yield f"{name}:{number}", row
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        report.skip("unreadable file", f"{name}: {error}")


def _json_lines(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(file, name, report):
        if line.strip():
            yield from _json_value(line, f"{name}:{number}", report)


def _json_values(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON array, placed as `file[index]`, or one object; many .json files are really lines."""
    text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        report.skip(f".json file over {MAX_JSON_BYTES >> 20} MiB, convert it to .jsonl", name)
    elif text.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        for _, rows in _json_value(text, name, report):
            yield from ((f"{name}[{index}]", row) for index, row in enumerate(rows))
    else:
        try:
            yield name, json.loads(text)
        except (ValueError, RecursionError):
            yield from _json_lines(io.BytesIO(text), name, report)


def _json_value(line: bytes, where: str, report: Report) -> Iterator[tuple[str, Any]]:
    try:
        yield where, json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        report.skip("invalid UTF-8", where)
    except (ValueError, RecursionError):
        report.skip("NUL byte" if b"\0" in line else "broken JSON", where)


class _ZstandardFile(io.RawIOBase):
    """Decompresses frame after frame. The library's own reader takes a file cut short for one that ends there."""

    def __init__(self, path: Path) -> None:
        if zstandard is None:
            raise UsageError(f"{path} needs the package zstandard to be read; run: pip install zstandard")
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                compressed, self._begun = self._frame.unused_data, False
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            else:
                compressed = b""
            compressed = compressed or self._file.read(1 << 13)
            if not compressed:
                if self._begun:
                    raise EOFError("the compressed data end in the middle of a frame")
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
