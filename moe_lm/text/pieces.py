"""A source in numbered pieces, which depend on its files alone and not on who reads them.

A piece is a run of small files, a file, or a range of a large one: bytes of JSON lines and of text, row groups of
Parquet, a shard of a data set. A range has the lines, and of text the documents, that begin in it. The documents of all
pieces in their order are those of the source read whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import SEEK_END
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError
from moe_lm.config.data import SourceConfig
from moe_lm.text.files import COMPRESSED_SUFFIXES, MAX_LINE_BYTES, UNREADABLE, Part, Piece, kind_of, open_decompressed
from moe_lm.text.sources import shards_of_dataset, text_piece_bytes

SMALLEST = 4 << 20  # bytes of a piece; more where a source would have more than MOST pieces
MOST = 1 << 10
LARGEST = 256 << 20
EXPANDS = 4  # as many times larger is what is compressed
LONG_LINE = 1 << 20  # a text with longer lines is not divided
LOOK_BACK = 1 << 12


def divide(source: SourceConfig, files: Sequence[tuple[str, Path]]) -> list[Piece]:
    """The pieces of a source with these files."""
    if source.dataset is not None:
        count = shards_of_dataset(source)
        return [(Part(source.dataset, Path(), shard, count),) for shard in range(count)]
    piece_bytes = text_piece_bytes(source)
    sizes = [
        size * (EXPANDS if path.suffix.lower() in COMPRESSED_SUFFIXES else 1)
        for (_, path), size in zip(files, storage.sizes([path for _, path in files]), strict=True)
    ]
    size = min(max(sum(sizes) // MOST, SMALLEST), LARGEST)
    pieces: list[Piece] = []
    together: list[Part] = []
    gathered = 0
    for (name, path), file_size in zip(files, sizes, strict=True):
        ranges = list(_ranges(name, path, size, file_size, piece_bytes)) if file_size > size else []
        if together and (len(ranges) > 1 or gathered + file_size > size):
            pieces.append(tuple(together))
            together, gathered = [], 0
        if len(ranges) > 1:
            pieces += [(part,) for part in ranges]
        else:
            together.append(Part(name, path))
            gathered += file_size
    return [*pieces, tuple(together)] if together else pieces


def _ranges(name: str, path: Path, size: int, file_size: int, piece_bytes: int) -> Iterator[Part]:
    """The ranges of a large file, none if it is read whole. One that cannot be read is reported by who reads it."""
    kind = kind_of(path)
    if path.suffix.lower() in COMPRESSED_SUFFIXES or storage.is_remote(path) or kind == ".json":
        return
    if kind == ".jsonl":
        for start in range(0, file_size, size):
            yield Part(name, path, start, min(start + size, file_size))
        return
    try:
        with open_decompressed(path) as file:
            bounds = _row_groups(file, size) if kind == ".parquet" else _text_bounds(file, size, piece_bytes)
    except ValueError:  # such are pyarrow's
        return
    except UNREADABLE:
        return
    for (start, documents), (stop, _) in pairwise(bounds):
        yield Part(name, path, start, stop, documents)


def _row_groups(file: BinaryIO, size: int) -> list[tuple[int, int]]:
    import pyarrow.parquet

    groups = pyarrow.parquet.ParquetFile(file).metadata
    bounds, gathered = [(0, 0)], 0
    for number in range(groups.num_row_groups):
        gathered += groups.row_group(number).total_byte_size
        if gathered >= size or number == groups.num_row_groups - 1:
            bounds.append((number + 1, 0))
            gathered = 0
    return bounds


def _text_bounds(file: BinaryIO, size: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Where ranges of a text file begin and end, with the documents before. Reads little: where a document may end."""
    end = file.seek(0, SEEK_END)
    bounds, place, documents = [(0, 0)], 0, 0
    while (stop := _end_of_document(file, place, piece_bytes)) is not None and stop < end:
        place, documents = stop, documents + 1
        if place - bounds[-1][0] >= size:
            bounds.append((place, documents))
    return [] if stop is None else [*bounds, (end, 0)]


def _end_of_document(file: BinaryIO, start: int, piece_bytes: int) -> int | None:
    """Where the document of a text ends that begins at `start`; None if it may have lines too long to be read."""
    if piece_bytes > MAX_LINE_BYTES // 2:
        return None
    back = min(piece_bytes - 1, LOOK_BACK)
    file.seek(start + piece_bytes - 1 - back)
    before = file.read(back)
    line_start = before.rfind(b"\n") + 1
    line = before[line_start:]
    if not line_start and back < piece_bytes - 1 and not line.strip():
        return None  # a long line of spaces, of which the beginning was not seen
    stop = start + piece_bytes - 1
    while rest := file.readline(LONG_LINE):
        stop += len(rest)
        if len(rest) == LONG_LINE:
            return None
        if not (line + rest).strip() or stop - start >= 4 * piece_bytes:
            break
        line = b""
    return stop


def check_unchanged(piece: Piece, before: dict[str, tuple[int, int]]) -> None:
    """Raise MoeLmError for a file that is not as it was."""
    if stamps_of(piece) != before:
        raise MoeLmError(f"{_names(piece)} changed while prepare was reading it; run prepare again when it is whole")


def stamps_of(piece: Piece) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files of a piece that are here. Raises MoeLmError for one that is gone."""
    stamps = {}
    for part in piece:
        if part.path != Path() and not storage.is_remote(part.path):
            try:
                status = part.path.stat()
            except OSError as error:
                raise MoeLmError(
                    f"cannot read {part.path}: {error.strerror}; it was there when prepare began"
                ) from error
            stamps[part.name] = status.st_size, status.st_mtime_ns
    return stamps


def _names(piece: Piece) -> str:
    return str(piece[0].path) if len(piece) == 1 else f"one of {piece[0].path} to {piece[-1].path}"
