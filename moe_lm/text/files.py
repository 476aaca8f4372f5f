"""Lines and rows of files that may be compressed or damaged, in memory bounded whatever their size.

One bad line never stops a file: what cannot be used is counted in a `Report` by reason, with the first place where
that happened.
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

from moe_lm.common import storage
from moe_lm.common.errors import UsageError

try:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
except ImportError:
    zstd = None  # type: ignore[assignment]

MAX_LINE_BYTES = 16 << 20  # a longer line is skipped: a line is held in memory whole
MAX_JSON_BYTES = 128 << 20  # a .json file is parsed whole; a larger one has to be .jsonl
COMPRESSED_SUFFIXES = frozenset({".gz", ".xz", ".zst"})
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, lzma.LZMAError, zlib.error)
if zstd is not None:
    UNREADABLE += (zstd.ZstdError,)

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with its place, like `a.jsonl:7`


@dataclass(frozen=True)
class Part:
    """A file or a range of it, from `start` to before `stop` (None: all of it).

    `documents` is how many documents of a text file come before.
    """

    name: str
    path: Path
    start: int = 0
    stop: int | None = None
    documents: int = 0


Piece = tuple[Part, ...]


@dataclass
class Report:
    """Counts of what was read, and by reason of what was left out or shortened, with the first place of each reason."""

    documents: int = 0
    text_bytes: int = 0
    rows: int = 0  # lines or rows of the file that was read last
    skipped: dict[str, int] = field(default_factory=dict)
    shortened: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    def shorten(self, reason: str, where: str) -> None:
        """Count a document or conversation of which a part is used."""
        self.shortened[reason] = self.shortened.get(reason, 0) + 1
        self.examples.setdefault(reason, where)

    def skipped_lines(self) -> list[str]:
        """One line per reason, like `3 skipped: invalid UTF-8 (first: a.txt:7)`."""
        return [
            f"{count} {done}: {reason} (first: {self.examples[reason]})"
            for done, counts in (("skipped", self.skipped), ("shortened", self.shortened))
            for reason, count in counts.items()
        ]


def kind_of(path: Path) -> str:
    """The suffix before any compression suffix, in lower case: `.jsonl` for `a.JSONL.xz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_decompressed(path: Path) -> BinaryIO:
    """The content of a file, here or in a store, decompressed when its name ends in .gz, .xz or .zst."""
    suffix = path.suffix.lower()
    file = storage.open_binary(path) if storage.is_remote(path) else path
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if suffix == ".zst":
        if zstd is None:
            raise UsageError(f"{path} needs the package backports.zstd to be read; run: pip install backports.zstd")
        return cast(BinaryIO, zstd.open(file, "rb"))
    return open(file, "rb") if isinstance(file, Path) else file


def read_rows(path: Path, name: str, report: Report, text_field: str | None = None, part: Part | None = None) -> Rows:
    """The rows of a .jsonl, .json or .parquet file, compressed or not.

    With `text_field` only this column of a Parquet file is read; a file in which it is missing or not text counts once.
    Of a `part` places count from its beginning.
    """
    if kind_of(path) == ".parquet":
        yield from _parquet_rows(path, name, report, text_field, part)
        return
    try:
        with open_decompressed(path) as opened:
            file = lines_of(opened, part)
            rows = _json_values(file, name, report) if kind_of(path) == ".json" else _json_lines(file, name, report)
            for where, row in rows:
                if isinstance(row, dict):
                    yield where, row
                else:
                    report.skip("row is not an object", where)
    except UNREADABLE as error:
        report.skip("unreadable file", f"{name}: {error}")


def text_problem(text: str) -> str | None:
    """The reason why a text must not reach the tokenizer, or None."""
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        return "invalid UTF-8"
    return None


def read_lines(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1. A line over MAX_LINE_BYTES is skipped without being held in memory."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES):
        number += 1
        report.rows = number
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            report.skip(f"line over {MAX_LINE_BYTES >> 20} MiB", f"{name}:{number}")
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            continue
        yield number, line


class LinesOfRange:
    """The lines of a file that begin in a range, to be read by `readline`."""

    def __init__(self, file: BinaryIO, part: Part) -> None:
        self._file, self._stop, self._begins = file, part.stop, True
        if part.start:
            file.seek(part.start - 1)
            while (line := file.readline(MAX_LINE_BYTES)) and not line.endswith(b"\n"):
                pass
        self._place = file.tell()

    def readline(self, limit: int) -> bytes:
        if self._begins and self._stop is not None and self._place >= self._stop:
            return b""
        line = self._file.readline(limit)
        self._place += len(line)
        self._begins = line.endswith(b"\n")
        return line


def lines_of(file: BinaryIO, part: Part | None) -> BinaryIO:
    """The file, of which only a part's lines are read."""
    return file if part is None or part.stop is None else cast(BinaryIO, LinesOfRange(file, part))


def groups_of(table: Any, part: Part | None) -> list[int] | None:
    """The row groups of a part of a Parquet file; None: all."""
    return None if part is None or part.stop is None else list(range(part.start, part.stop))


def _parquet_rows(path: Path, name: str, report: Report, text_field: str | None, part: Part | None) -> Rows:
    import pyarrow

    try:
        with _open_parquet(path) as table:
            if text_field is not None and (problem := _column_problem(table.schema_arrow, text_field)):
                reason, detail = problem
                if part is None or not part.start:  # once a file
                    report.skip(reason, f"{name}, {detail}")
                return
            batches = table.iter_batches(
                batch_size=256, columns=text_field and [text_field], row_groups=groups_of(table, part)
            )
            for number, row in enumerate(chain.from_iterable(map(_batch_rows, batches)), 1):
                report.rows = number
                if row is None:
                    report.skip("invalid UTF-8", f"{name}:{number}")
                else:
                    yield f"{name}:{number}", row
    except (pyarrow.ArrowException, *UNREADABLE) as error:
        report.skip("unreadable file", f"{name}: {error}")


@contextmanager
def _open_parquet(path: Path) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`. Its index stands at its end, so a compressed file is unpacked to disk first."""
    import pyarrow.parquet

    with open_decompressed(path) as stream, tempfile.TemporaryFile() as seekable:
        file: BinaryIO = stream
        if path.suffix.lower() in COMPRESSED_SUFFIXES:
            shutil.copyfileobj(stream, seekable)
            file = cast(BinaryIO, seekable)
        yield pyarrow.parquet.ParquetFile(file)


def _column_problem(schema: Any, text_field: str) -> tuple[str, str] | None:
    """The reason why a column cannot be read as text, with the detail; None when it can."""
    import pyarrow

    if text_field not in schema.names:
        return f"no field {text_field!r}", f"which has {', '.join(schema.names)}"
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return f"field {text_field!r} is not text", f"where it is {kind}"
    return None


def _batch_rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a record batch, None for one with a string that is not UTF-8."""

    def one(index: int) -> dict[str, Any] | None:
        try:
            return cast(dict[str, Any], batch.slice(index, 1).to_pylist()[0])
        except UnicodeDecodeError:
            return None

    try:
        return cast(list[dict[str, Any] | None], batch.to_pylist())
    except UnicodeDecodeError:  # raised for all rows because of one
        return [one(index) for index in range(batch.num_rows)]


def _json_lines(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[str, Any]]:
    for number, line in read_lines(file, name, report):
        if line.strip():
            yield from _json_value(line, f"{name}:{number}", report)


def _json_values(file: BinaryIO, name: str, report: Report) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON array, placed as `file[index]`, or one object; many .json files hold JSON lines."""
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
