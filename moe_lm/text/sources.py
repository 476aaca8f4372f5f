"""Documents from text files, JSON rows, Parquet, `datasets` data sets and the Python standard library.

The order is the same on every run. What cannot be used is counted in a `Report` and stops nothing.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import SourceConfig
from moe_lm.text.files import (
    MAX_LINE_BYTES,
    UNREADABLE,
    Part,
    Piece,
    Report,
    Rows,
    kind_of,
    lines_of,
    open_decompressed,
    read_lines,
    read_rows,
    text_problem,
)

TEXT_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".html", ".css", ".yaml", ".toml", ".sql", ".sh"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".go", ".java", ".js", ".ts", ".rs"}
)
ROW_SUFFIXES = frozenset({".jsonl", ".json", ".parquet"})
# What is no plain text, though its bytes may look like it: what makes text of it.
NOT_TEXT = (
    dict.fromkeys((".pdf", ".djvu", ".ps"), "convert it first, for instance with pdftotext")
    | dict.fromkeys(
        (".docx", ".doc", ".odt", ".rtf", ".epub", ".mobi"), "convert it first, for instance with pandoc -t plain"
    )
    | dict.fromkeys((".csv", ".tsv", ".xlsx", ".xls"), 'write its text column as .jsonl, a line {"text": ...} a row')
    | dict.fromkeys((".zip", ".tar", ".7z", ".rar"), "unpack it and give the folder")
)
STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

TOPICS = "pydoc_data/topics.py"  # Python's language documentation: one large dictionary of texts


@dataclass(frozen=True)
class Document:
    """One text. `id` is stable across runs: the path in its folder, or for rows a hash of the text."""

    id: str
    text: str


def read_documents(
    source: SourceConfig,
    report: Report,
    piece: Piece | None = None,
    max_bytes: int | None = None,
    duplicates: Collection[int] = (),
) -> Iterator[Document]:
    """The documents of a source in order, or those of a piece of it (pieces.py), up to `max_bytes` of text.

    Without `max_bytes` they are those of the source. The documents at the places of `duplicates` are left out, but
    their text counts. Raises UsageError when the whole source has no document.
    """
    before, place = report.documents, 0
    most = source.max_bytes if max_bytes is None else max_bytes
    budget = report.text_bytes + most if most is not None else None
    for document, where in _candidates(source, report, piece):
        problem = text_problem(document.text) if document.text.strip() else "empty document"
        if problem is not None:
            report.skip(problem, where)
            continue
        report.text_bytes += len(document.text.encode("utf-8"))
        if place in duplicates:
            report.skip("duplicate", where)
        else:
            report.documents += 1
            yield document
        place += 1
        if budget is not None and report.text_bytes >= budget:
            return
    if report.documents == before and piece is None:
        raise no_usable_document(source, report)


def no_usable_document(source: SourceConfig, report: Report) -> UsageError:
    """The error about a source without a document, with what was left out and why."""
    reasons = "; ".join(report.skipped_lines()) or "it is empty"
    return UsageError(f"source {source.name!r} ({origin(source)}) has no usable document: {reasons}")


def text_piece_bytes(source: SourceConfig) -> int:
    """The size at which the texts of a source are cut into documents."""
    # A module of the standard library stays in one piece, so that all of it is held out or none.
    return MAX_LINE_BYTES if source.stdlib else source.piece_bytes


def source_files(source: SourceConfig, report: Report | None = None) -> list[tuple[str, Path]]:
    """The files of a `path` or `stdlib` source, sorted, each with its name: its POSIX path relative to the root."""
    if source.stdlib:
        return _stdlib_files()
    if source.path is not None and storage.is_remote(source.path):
        return _checked(source, _remote_files(source.path, report or Report()))
    path = Path(source.path or "").expanduser()
    if path.is_dir():
        files = _folder_files(path, report or Report())
    elif path.is_file():
        files = [(path.name, path)]
    elif glob.has_magic(str(path)):
        files = _glob_files(str(path))
    else:
        raise UsageError(f"source {source.name!r}: path {source.path} does not exist; correct the path")
    return _checked(source, files)


def _checked(source: SourceConfig, files: list[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The files of a source, if there are some, and all of kinds that are read."""
    for _, path in files:
        check_kind(source.name, path)
    if not files:
        raise UsageError(
            f"source {source.name!r}: path {source.path} matches no file to read; "
            f"expected text, .jsonl, .json or .parquet, each also .gz, .xz or .zst"
        )
    return files


def check_kind(name: str, path: Path) -> None:
    """Raise UsageError for a file whose name says that it is no text."""
    if (advice := NOT_TEXT.get(kind_of(path))) is not None:
        raise UsageError(f"source {name!r}: {path} is not plain text; {advice}")


def origin(source: SourceConfig) -> str:
    """The path, data set or library of a source, for messages."""
    return source.path or source.dataset or "the Python standard library"


def _candidates(source: SourceConfig, report: Report, piece: Piece | None) -> Iterator[tuple[Document, str]]:
    """Every document with its place (`file:line`), before the checks that every text must pass."""
    if source.dataset is not None:
        shard = None if piece is None else (piece[0].start, piece[0].stop or 1)
        reader = f"source {source.name!r}"
        for number, (where, row) in enumerate(
            read_dataset(source.dataset, source.subset, source.split, reader, shard), 1
        ):
            report.rows = number
            yield from _row_document(row, source.text_field, where, report)
        return
    for part in piece or [Part(name, path) for name, path in source_files(source, report)]:
        name, path = part.name, part.path
        kind = kind_of(path)
        if source.stdlib and name == TOPICS:
            yield from _topics()
        elif kind not in ROW_SUFFIXES:
            yield from _text_documents(part, text_piece_bytes(source), report)
        else:
            for where, row in read_rows(path, name, report, source.text_field, part):
                yield from _row_document(row, source.text_field, where, report)


def _text_documents(part: Part, piece_bytes: int, report: Report) -> Iterator[tuple[Document, str]]:
    name = part.name
    try:
        with open_decompressed(part.path) as opened:
            file = lines_of(opened, part)
            for index, (line, piece) in enumerate(_pieces(file, name, piece_bytes, report), part.documents):
                try:
                    text = piece.decode("utf-8")
                except UnicodeDecodeError as error:
                    lines_before = piece.count(b"\n", 0, error.start)
                    report.skip("invalid UTF-8", f"{name}:{line + lines_before}")
                else:
                    yield Document(f"{name}#{index}" if index else name, text), f"{name}:{line}"
    except UNREADABLE as error:
        report.skip("unreadable file", f"{name}: {error}")


def _topics() -> Iterator[tuple[Document, str]]:
    """The texts behind `help("TOPIC")`, one document each, as readers see them and not as their module quotes them."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"pydoc_data/topics/{name}", text), TOPICS


def _pieces(file: BinaryIO, name: str, piece_bytes: int, report: Report) -> Iterator[tuple[int, bytes]]:
    """The pieces of a file, cut at blank lines after about `piece_bytes`, each with the number of its first line."""
    lines: list[bytes] = []
    size = first = number = 0
    skipped = sum(report.skipped.values())
    for number, line in read_lines(file, name, report):
        first = first or number
        lines.append(line)
        size += len(line)
        if size >= piece_bytes and (not line.strip() or size >= 4 * piece_bytes):
            yield first, b"".join(lines)
            lines, size, first = [], 0, 0
    is_empty = not number and sum(report.skipped.values()) == skipped
    if lines or is_empty:
        yield max(first, 1), b"".join(lines)


def _row_document(row: dict[str, Any], text_field: str, where: str, report: Report) -> Iterator[tuple[Document, str]]:
    text = row.get(text_field)
    if isinstance(text, str):
        # Named by its text and not by its place: equal texts fall into the same split, and new rows rename none.
        yield Document(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), text), where
    elif text_field in row:
        report.skip(f"field {text_field!r} is not text", where)
    else:
        report.skip(f"no field {text_field!r}", f"{where}, which has {', '.join(map(repr, list(row)[:8])) or 'none'}")


def shards_of_dataset(source: SourceConfig) -> int:
    """In how many shards a data set can be read. Raises MoeLmError as `read_dataset`."""
    import datasets

    with _dataset_errors(source.dataset, source.subset, source.split, f"source {source.name!r}"):
        rows = datasets.load_dataset(source.dataset, source.subset, split=source.split, streaming=True)
        return max(1, int(rows.num_shards))
    raise AssertionError  # never reached: the block returns or raises


def read_dataset(name: str, subset: str | None, split: str, reader: str, shard: tuple[int, int] | None = None) -> Rows:
    """The rows of a `datasets` data set, streamed, or those of a shard of it: its number, and how many there are.

    Raises MoeLmError, which begins with `reader`, for anything that the library, the network or a file format raises.
    """
    import datasets

    with _dataset_errors(name, subset, split, reader):
        rows = datasets.load_dataset(name, subset, split=split, streaming=True)
        if shard is not None and shard[1] > 1:
            rows = rows.shard(num_shards=shard[1], index=shard[0])
        for number, row in enumerate(rows, 1):
            yield f"{name}:{number}", row


@contextmanager
def _dataset_errors(name: str | None, subset: str | None, split: str, reader: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split())
        raise MoeLmError(
            f"{reader}: data set {name} (subset {subset}, split {split}) cannot be read: {message}"
        ) from error


def _folder_files(root: Path, report: Report) -> list[tuple[str, Path]]:
    """The files of a known kind under a folder, without hidden ones."""
    return _of_known_kind(_walk(root, left_out=frozenset()), report)


def _of_known_kind(found: Iterable[tuple[str, Path]], report: Report) -> list[tuple[str, Path]]:
    files = []
    for name, path in found:
        if kind_of(path) in TEXT_SUFFIXES | ROW_SUFFIXES:
            files.append((name, path))
        else:
            report.skip("unknown kind of file", name)
    return files


def _remote_files(url: str, report: Report) -> list[tuple[str, Path]]:
    """The files of a folder or glob in a store, or the one file; `Path` is how the other readers know their names."""
    is_glob = storage.has_magic(url)
    found = storage.glob(url) if is_glob else storage.find(url)
    files = [(file.name, Path(file.url)) for file in found]
    if [Path(url)] == [path for _, path in files]:
        return files
    files = [(name, path) for name, path in files if not _is_hidden(name)]
    return files if is_glob else _of_known_kind(files, report)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _glob_files(pattern: str) -> list[tuple[str, Path]]:
    parts = Path(pattern).parts
    plain = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:plain])
    found = (Path(name) for name in glob.glob(pattern, recursive=True))
    return sorted((_name(path, root), path) for path in found if path.is_file())


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [(name, path) for name, path in _walk(root, STDLIB_LEFT_OUT) if path.suffix == ".py"]
    if not files:
        raise UsageError(f"this Python has no library source in {root}; set path to a folder of text instead")
    return files


def _walk(root: Path, left_out: frozenset[str]) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in left_out and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        found += [(_name(path, root), path) for path in paths if path.is_file()]
    return sorted(found)


def _name(path: Path, root: Path) -> str:
    """The path relative to the root, as printable text even where a name is not UTF-8."""
    return os.fsencode(path.relative_to(root).as_posix()).decode("utf-8", "backslashreplace")
