"""Token files that other programs wrote: which of them a path names, and where in each the tokens lie.

The kind of a file is told by what lies beside it and by its first bytes:

- Megatron: `.bin` of tokens, and `.idx` with the lengths of sequences, their places and the bounds of documents.
- datatrove: `.ds` of tokens, with `.ds.index`, the ends of documents, and `.ds.metadata`.
- NumPy: `.npy` with NumPy's header and one axis.
- llm.c, modded-nanogpt: `.bin` that begins with 256 int32, of which the third is the number of tokens.
- flat: nothing but ids, as in nanoGPT's `.bin` and in OLMo's `.npy`, which lack the header of that name.
"""

from __future__ import annotations

import glob
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moe_lm.common.errors import UsageError
from moe_lm.common.files import read_regular
from moe_lm.data.stream import TokenFile

UINT16: np.dtype[Any] = np.dtype("<u2")
UINT32: np.dtype[Any] = np.dtype("<u4")
SUFFIXES = frozenset({".bin", ".npy", ".ds"})  # of token files in a folder
COMPANIONS = (".idx", ".index", ".metadata", ".loss", ".csv.gz", ".pkl")  # lie beside token files and hold no tokens
TEXT = re.compile(r"\.(txt|md|jsonl?|parquet|arrow|gz|xz|zst|zip|tar)$", re.IGNORECASE)
HELD_OUT = re.compile(r"(?<![a-z0-9])(val|valid|validation)(?![a-z0-9])", re.IGNORECASE)
TRAIN = re.compile(r"(?<![a-z0-9])train(?![a-z0-9])")

MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of an id, sequences, bounds of documents
MEGATRON_IDS = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
LLM_C = struct.Struct("<iii")  # magic, version, tokens
LLM_C_BYTES = 4 * 256
LLM_C_IDS: dict[tuple[int, int], np.dtype[Any]] = {
    (20240520, 1): UINT16,
    (20240801, 7): UINT32,
}  # GPT-2's ids and Llama 3's
READ_AS: dict[str, np.dtype[Any]] = {  # types that files may have, and the type of a shard that the same bytes are
    "uint16": UINT16, "int16": UINT16, "uint32": UINT32, "int32": UINT32,
}  # fmt: skip
MOST_INDEX = 1 << 16  # entries of an index that are read at once
MOST_METADATA = 1 << 16  # bytes
HEAD_TOKENS = 1 << 16  # looked at to tell the type of an id
FEW_TOKENS = 16  # tell nothing


@dataclass(frozen=True)
class Located:
    """The tokens of a file: `tokens` of them, behind `offset` bytes.

    A negative id of a signed type reads as more than `most`. `ends`: where documents end, in tokens and in order, some
    at a time; None where no index tells.
    """

    path: Path
    kind: str
    dtype: np.dtype[Any]
    offset: int
    tokens: int
    most: int
    ends: Callable[[], Iterator[NDArray[np.int64]]] | None = None

    def file(self, start: int = 0, stop: int | None = None) -> TokenFile:
        """The tokens start to stop."""
        stop = self.tokens if stop is None else stop
        return TokenFile(self.path, self.dtype, stop - start, self.offset + start * self.dtype.itemsize)


def find(path: str) -> list[Path]:
    """The token files that a path names, sorted; a folder is searched for files with a known suffix.

    Raises UsageError when there is none, or when one of them cannot be token ids.
    """
    if "://" in path:
        raise UsageError(f"token files are read where they are, and not from {path}; copy them here, or mount that")
    place = Path(path).expanduser()
    if place.is_dir():
        within = (file for file in place.rglob("*") if not _is_hidden(file.relative_to(place)))
        files = [file for file in within if file.suffix in SUFFIXES]
    elif place.is_file():
        files = [place.with_suffix(".bin") if place.suffix == ".idx" else place]
    elif Path(f"{place}.idx").is_file():  # as Megatron's data_path names both files
        files = [Path(f"{place}.bin")]
    else:
        files = [Path(name) for name in glob.glob(str(place), recursive=True) if not name.endswith(COMPANIONS)]
    files = sorted(file for file in files if not file.is_dir())
    if not files:
        raise UsageError(f"no token file is at {path}; expected .bin, .npy or .ds: a file, a folder or a glob")
    for file in files:
        if TEXT.search(file.name):
            raise UsageError(
                f"{file} is text or is packed, not token ids; unpack it, or give text as the path of a source"
            )
    return files


def with_held_out(path: str) -> tuple[list[Path], list[Path]]:
    """The files of a path, and those of them, or beside a `train.bin`, that are named as held out."""
    files = find(path)
    if len(files) == 1:
        name = files[0].name
        beside = (TRAIN.sub(word, name) for word in ("val", "valid", "validation"))
        return files, [
            files[0].with_name(other) for other in beside if other != name and files[0].with_name(other).is_file()
        ]
    held_out = [file for file in files if HELD_OUT.search(file.stem)]
    if len(held_out) == len(files):
        return files, []
    return [file for file in files if file not in held_out], held_out


def locate(path: Path, flat_dtype: np.dtype[Any] | None, vocab_size: int) -> Located:
    """Where the tokens of a file lie, as its header and what lies beside it say.

    `flat_dtype` is the type of ids in a file that does not say it; None: the smaller that holds every id of the
    vocabulary. Raises UsageError for a file that is not what it says, or whose sizes do not add up.
    """
    if not path.is_file():
        raise UsageError(f"token file {path} is missing; bring it back")
    path = path.resolve()  # what lies in a cache of the hub is a link
    flat_dtype = flat_dtype or (UINT16 if vocab_size <= 1 << 16 else UINT32)
    try:
        with path.open("rb") as file:
            head = file.read(max(LLM_C.size, len(npy.MAGIC_PREFIX)))
        if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
            located = _megatron(path, path.with_suffix(".idx"))
        elif path.suffix == ".ds":
            located = _datatrove(path, flat_dtype)
        elif head.startswith(npy.MAGIC_PREFIX):
            located = _numpy(path)
        elif len(head) >= LLM_C.size and LLM_C.unpack_from(head)[:2] in LLM_C_IDS:
            located = _llm_c(path, head)
        else:
            located = _whole(path, "flat", flat_dtype)
    except OSError as error:
        raise UsageError(f"cannot read token file {path}: {error.strerror or error}") from error
    _check_width(located, vocab_size)
    return located


def _whole(path: Path, kind: str, dtype: np.dtype[Any], offset: int = 0, most: int | None = None) -> Located:
    """All that follows `offset` as tokens."""
    tokens, rest = divmod(path.stat().st_size - offset, dtype.itemsize)
    if rest:
        raise UsageError(
            f"{path} has {path.stat().st_size} bytes, which are no whole number of {dtype.name} ids; it was cut short, "
            "or set another dtype in its tokens"
        )
    return Located(path, kind, dtype, offset, tokens, np.iinfo(dtype).max if most is None else most)


def _check_width(located: Located, vocab_size: int) -> None:
    """Raise UsageError when ids of 4 bytes are read as ids of 2: each second one would be 0, and none too large."""
    if located.dtype == UINT16 and (count := min(located.tokens, HEAD_TOKENS) // 2) >= FEW_TOKENS:
        head = located.file()[: 2 * count]
        if head.any() and int(head.view(UINT32).max()) < vocab_size:
            raise UsageError(
                f"{located.path} holds ids of 4 bytes, and would be read as uint16, with {located.tokens:,} ids; set "
                "dtype=uint32 in its tokens"
            )


def _read_as(path: Path, name: str) -> tuple[np.dtype[Any], int]:
    """The type in which ids of a type are read, and the largest id that it has."""
    if name not in READ_AS:
        raise UsageError(
            f"{path} has ids of type {name}, expected one of {', '.join(READ_AS)}; write it again with one of these"
        )
    return READ_AS[name], int(np.iinfo(name).max)


def _megatron(path: Path, index: Path) -> Located:
    with index.open("rb") as file:
        header = file.read(MEGATRON_HEADER.size)
    if len(header) < MEGATRON_HEADER.size or not header.startswith(MEGATRON):
        raise UsageError(f"{index} lies beside {path.name} and does not begin as Megatron's index; is it another file?")
    _, version, code, sequences, bounds = MEGATRON_HEADER.unpack(header)
    if version != 1:
        raise UsageError(f"{index} has version {version}, expected 1; write it again with a newer Megatron")
    dtype, most = _read_as(path, MEGATRON_IDS.get(code, f"number {code}"))
    places = MEGATRON_HEADER.size + 4 * sequences
    expected = places + 8 * (sequences + bounds)
    size = index.stat().st_size
    if size == expected + sequences > expected:
        raise UsageError(f"{index} has modes of sequences, so that not all of {path.name} is text; expected text alone")
    if size != expected:
        raise UsageError(
            f"{index} has {size} bytes, expected {expected} for {sequences} sequences and {bounds} bounds of "
            "documents; it is damaged, write it again"
        )
    lengths = TokenFile(index, np.dtype("<i4"), sequences, MEGATRON_HEADER.size)
    pointers = TokenFile(index, np.dtype("<i8"), sequences, places)
    documents = TokenFile(index, np.dtype("<i8"), bounds, places + 8 * sequences)
    located = _whole(path, "Megatron", dtype, most=most)
    _check_sequences(located, index, lengths, pointers)
    _check_bounds(index, documents, sequences)

    def ends() -> Iterator[NDArray[np.int64]]:
        for places in _parts(documents, 1):
            first, last = int(places[0]), int(places[-1])
            known = pointers[first : last + 1] // dtype.itemsize  # where the sequences begin
            begins = known if last < sequences else np.append(known, located.tokens)
            yield begins[places - first]

    return located if bounds < 2 else replace(located, ends=ends)


def _check_sequences(located: Located, index: Path, lengths: TokenFile, pointers: TokenFile) -> None:
    """Raise UsageError unless the sequences lie one behind the other and are the whole file."""
    done = 0
    for part, places in zip(_parts(lengths), _parts(pointers), strict=True):
        if (wrong := np.flatnonzero(part < 0)).size:
            raise UsageError(f"{index} has a sequence of {part[wrong[0]]} tokens; it is damaged, write it again")
        ends = done + np.cumsum(part, dtype=np.int64)
        if (wrong := np.flatnonzero(places != (ends - part) * located.dtype.itemsize)).size:
            raise UsageError(
                f"{index} has a sequence at byte {places[wrong[0]]} of {located.path.name}, expected byte "
                f"{(ends[wrong[0]] - part[wrong[0]]) * located.dtype.itemsize}, behind the one before: sequences that "
                "overlap or leave gaps are not read; merge the files again"
            )
        done = int(ends[-1])
    if done != located.tokens:
        raise UsageError(
            f"{located.path} has {located.tokens} {located.dtype.name} ids, and {index.name} counts {done}: one of "
            "them was cut short or is another's; bring the right one"
        )


def _check_bounds(index: Path, documents: TokenFile, sequences: int) -> None:
    before = 0
    for part in _parts(documents):
        if part[0] < before or (np.diff(part) < 0).any():
            raise UsageError(f"{index} has documents that overlap; it is damaged, write it again")
        before = int(part[-1])
    if len(documents) and (documents[:1][0] != 0 or before != sequences):
        raise UsageError(
            f"{index} has documents from sequence {documents[:1][0]} to {before}, expected from 0 to {sequences}; it "
            "is damaged, write it again"
        )


def _datatrove(path: Path, flat_dtype: np.dtype[Any]) -> Located:
    metadata, index = (path.with_name(path.name + suffix) for suffix in (".metadata", ".index"))
    dtype, count = flat_dtype, None
    if metadata.is_file():
        lines = read_regular(metadata, MOST_METADATA).decode("utf-8", "replace").splitlines()
        size = lines[0].rpartition("|")[2] if lines else ""
        if size not in ("2", "4") or len(lines) < 2 or not lines[1].isdecimal():
            raise UsageError(f"{metadata} does not tell bytes of an id and tokens as datatrove does; write it again")
        dtype, count = np.dtype(f"<u{size}"), int(lines[1])
    located = _whole(path, "datatrove", dtype)
    if count not in (None, located.tokens):
        raise UsageError(
            f"{path} has {located.tokens} {dtype.name} ids, and {metadata.name} counts {count}; write it again"
        )
    if not index.is_file():
        return located
    number, rest = divmod(index.stat().st_size, 8)
    ends = TokenFile(index, np.dtype("<i8"), number)
    before = 0
    for part in _parts(ends):
        if rest or part[0] < before or (np.diff(part) < 0).any():
            raise UsageError(f"{index} has ends of documents that are out of order; it is damaged, write it again")
        before = int(part[-1])
    if before != located.tokens:
        raise UsageError(
            f"{path} has {located.tokens} {dtype.name} ids, and its documents end at {before} by {index.name}; one of "
            "the two was cut short, or set another dtype in its tokens"
        )
    return replace(located, ends=lambda: _parts(ends))


def _numpy(path: Path) -> Located:
    with path.open("rb") as file:
        try:
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, TypeError, SyntaxError, TokenError, EOFError, RecursionError, MemoryError) as error:
            raise UsageError(f"{path} begins as NumPy's .npy, and its header is damaged: {error}") from error
        offset = file.tell()
    if len(shape) != 1:
        raise UsageError(f"{path} is an array with axes {shape}, expected one axis of ids; save it flattened")
    ids, most = _read_as(path, dtype.name if dtype.byteorder != ">" else f"big-endian {dtype.name}")
    located = _whole(path, "NumPy", ids, offset, most)
    if located.tokens != shape[0]:
        raise UsageError(
            f"{path} has {located.tokens} ids, and its header counts {shape[0]}; it was cut short, bring the whole"
        )
    return located


def _llm_c(path: Path, head: bytes) -> Located:
    magic, version, count = LLM_C.unpack_from(head)
    dtype = LLM_C_IDS[magic, version]
    size = path.stat().st_size
    if size != LLM_C_BYTES + count * dtype.itemsize:
        raise UsageError(
            f"{path} has {size} bytes, and its header counts {count} {dtype.name} ids behind {LLM_C_BYTES} bytes; it "
            "was cut short or damaged, bring the whole file"
        )
    return _whole(path, "llm.c", dtype, LLM_C_BYTES)


def _parts(index: TokenFile, start: int = 0) -> Iterator[NDArray[np.int64]]:
    """The entries of an index from `start` on, some at a time."""
    for begin in range(start, len(index), MOST_INDEX):
        yield index[begin : begin + MOST_INDEX]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)
