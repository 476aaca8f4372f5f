"""One safetensors file, read and written piece by piece.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor),
and the tensors' bytes one after the other. The library checks a header. It reads a tensor by mapping the whole file,
though, whose pages then count as memory of this process, and a file that is cut off under it kills the process. So
tensors are read here, and memory goes only to the piece at hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import OpenFiles, open_regular
from moe_lm.common.integrity import Entry, Hashed

ALIGNMENT = 4096  # of the tensors in a file: the kernel copies aligned bytes several times as fast
PIECE_BYTES = 1 << 24  # of a tensor, in memory at once
MOST_HEADER = 100_000_000  # bytes, as in the library
MOST_DIMENSIONS, MOST_ROWS = 16, 1 << 48
WEIGHTS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPES = WEIGHTS | {
    "F64": torch.float64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a file keeps a tensor."""

    file: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype_among(DTYPES)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of a weight. Raises MoeLmError, naming file and tensor, unless it is one of WEIGHTS."""
        return self._dtype_among(WEIGHTS)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start..stop` of the first dimension, in memory of their own. A scalar is one row."""
        rows = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        self.read_into(rows, start * math.prod(self.shape[1:]))
        return rows

    def read_into(self, elements: Tensor, start: int, files: OpenFiles | None = None) -> None:
        """Fill contiguous memory of this dtype with the elements from `start` on; `files` keeps the file open."""
        buffer, place = as_bytes(elements), self.start + start * self.dtype.itemsize
        with _open(self.file) if files is None else files.of(self.file, lambda: _open(self.file)) as file:
            while buffer:
                count = os.preadv(file.fileno(), [buffer], place)
                if not count:
                    raise MoeLmError(f"{self.file} ends within tensor {self.name}; it changed while it was read")
                buffer, place = buffer[count:], place + count

    def _dtype_among(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        if self.dtype_name not in dtypes:
            raise MoeLmError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype_name}, expected one of {', '.join(dtypes)}; "
                "convert the checkpoint to bfloat16 or float32 first"
            )
        return dtypes[self.dtype_name]


class Header(NamedTuple):
    """A file's tensors by name, and the texts that its writer left."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class Output(NamedTuple):
    """A tensor to be written; `pieces()` makes its rows, in order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> Header:
    """The header of a file, checked by the library before any of it is believed.

    Raises MoeLmError naming the file and what is wrong with it: a length that the file does not have, JSON of another
    form, a shape that does not fit its bytes, bytes that overlap, lie outside the file or belong to no tensor.
    """
    with _open(path) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        most = min(MOST_HEADER, max(0, size - 8))
        if length > most:  # before anything is allocated for it
            raise _unsound(path, f"its header has {length} bytes, expected at most {most}")
        try:
            with safe_open(path, "numpy"):
                pass
            entries: dict[str, Any] = json.loads(file.read(length))
        except (SafetensorError, ValueError, RecursionError) as error:
            raise _unsound(path, error) from error
    metadata = entries.pop("__metadata__", None) or {}
    for name, entry in entries.items():
        if len(entry["shape"]) > MOST_DIMENSIONS or max(entry["shape"], default=0) >= MOST_ROWS:
            raise _unsound(path, f"tensor {name} has more than {MOST_DIMENSIONS} dimensions, or one of 2**48 rows")
    tensors = {
        name: Stored(path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
    }
    return Header(tensors, metadata)


def write_file(path: Path, outputs: Sequence[Output], metadata: Mapping[str, str]) -> Entry:
    """Write the tensors in the order of their item size, largest first, so that each begins at a multiple of its own.

    Returns the file's line for a manifest, of the tensors as they are in memory.

    Raises OSError when the disk does not take it.
    """
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for output in ordered:
        offsets = [place, place + output.size]
        header[output.name] = {"dtype": NAMES[output.dtype], "shape": list(output.shape), "data_offsets": offsets}
        place += output.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with path.open("wb") as raw:
        file = Hashed(raw)
        file.write(len(text).to_bytes(8, "little") + text)
        for output in ordered:
            written = sum(file.write(as_bytes(piece.to(output.dtype))) for piece in output.pieces())
            if written != output.size:
                raise MoeLmError(f"{path}: tensor {output.name} came to {written} bytes, expected {output.size}")
    return file.entry


def write_files(folder: Path, outputs: Sequence[Output], metadata: Mapping[str, str], max_bytes: int) -> dict[str, str]:
    """Write the tensors into as few files as `max_bytes` a file allows; returns the file of each tensor.

    A tensor is never divided. One file is `model.safetensors`, several are `model-00001-of-00003.safetensors` and on.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.size
    placed = {}
    for number, group in enumerate(groups, 1):
        several = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        name = several if len(groups) > 1 else "model.safetensors"
        write_file(folder / name, group, metadata)
        placed.update({output.name: name for output in group})
    return placed


def pieces_of(shape: Sequence[int], item_bytes: int = 4) -> Iterator[tuple[int, int]]:
    """Rows (start, stop) of the first dimension, PIECE_BYTES at a time and at least one row. A scalar is one row."""
    rows = shape[0] if shape else 1
    row_bytes = math.prod(shape[1:]) * item_bytes
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _unsound(path: Path, why: object) -> MoeLmError:
    return MoeLmError(f"{path} is not a sound safetensors file: {why}; copy it again")


def _open(path: Path) -> BinaryIO:
    """Open a regular file, but not through a symbolic link that leads out of its repository."""
    try:
        return open_regular(path)
    except UsageError as error:
        raise MoeLmError(str(error)) from error
