"""One safetensors file, read and written piece by piece; nothing that its header claims is believed unchecked.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor),
and the tensors' bytes one after the other. Memory goes to the piece at hand alone: the library would map or hold a
whole file.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import MoeLmError

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
PIECE_BYTES = 1 << 24  # what is read at once of a tensor that needs no turning
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in FLOATS.items()}
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1,
    "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


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
        """Raises MoeLmError, naming file and tensor, for what weights are not kept in."""
        if self.dtype_name not in FLOATS:
            raise MoeLmError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype_name}, expected one of {', '.join(FLOATS)}; "
                "convert the checkpoint to bfloat16 or float32 first"
            )
        return FLOATS[self.dtype_name]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start..stop` of the first dimension, read into memory of their own."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = bytearray((stop - start) * row_bytes)
        if not buffer:
            return torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        with _open(self.file) as file:
            file.seek(self.start + start * row_bytes)
            if file.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
                raise MoeLmError(f"{self.file} ends within tensor {self.name}; it changed while it was read")
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - start, *self.shape[1:])


class Header(NamedTuple):
    """What a file holds: its tensors by name, and the texts that its writer left."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class Output(NamedTuple):
    """A tensor to be written; `pieces()` makes, in order, what it consists of."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> Header:
    """The header of a file, once every claim of it was checked against the file's size.

    Raises MoeLmError naming the file, and the tensor where it is one's fault: an absurd length, JSON that is none, a
    name twice, a shape that does not fit its bytes, bytes that overlap, lie outside the file or belong to no tensor.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"its first 8 bytes promise a header of {length} bytes in a file of {size}")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _broken(path, "its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its __metadata__ is not a table of texts")
    begin = 8 + length
    tensors: dict[str, Stored] = {}
    end_of_last = 0
    for name, dtype, shape, start, stop in sorted(
        (_entry(path, *item) for item in entries.items()), key=lambda entry: (entry[3], entry[4])
    ):
        if start != end_of_last:
            wrong = "overlaps another" if start < end_of_last else "leaves bytes before it that belong to no tensor"
            raise _broken(path, f"tensor {name} at bytes {start} to {stop} of the data {wrong}")
        end_of_last = stop
        tensors[name] = Stored(path, name, dtype, shape, begin + start)
    if begin + end_of_last != size:
        wrong = "is cut off" if begin + end_of_last > size else "has bytes behind its last tensor"
        raise _broken(path, f"it {wrong}: the header promises {begin + end_of_last} bytes, the file has {size}")
    return Header(tensors, metadata)


def write_file(path: Path, outputs: Sequence[Output], metadata: Mapping[str, str]) -> None:
    """Write the tensors in the order of their item size, largest first, so that each begins at a multiple of its own.

    Raises OSError when the disk does not take it.
    """
    ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, shape, dtype, _ in ordered:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in ordered:
            written = sum(_write_piece(file, piece, output.dtype) for piece in output.pieces())
            if written != output.size:
                raise MoeLmError(f"{path}: tensor {output.name} came to {written} bytes, expected {output.size}")


def write_files(folder: Path, outputs: Sequence[Output], metadata: Mapping[str, str], max_bytes: int) -> dict[str, str]:
    """Write the tensors into as few files as `max_bytes` a file allows; which file holds each tensor.

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


def pieces_of(shape: Sequence[int], item_bytes: int) -> Iterator[tuple[int, int]]:
    """Rows (start, stop) of the first dimension, PIECE_BYTES at a time and at least one row."""
    row_bytes = math.prod(shape[1:]) * item_bytes
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in memory order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_piece(file: BinaryIO, piece: Tensor, dtype: torch.dtype) -> int:
    return file.write(as_bytes(piece.to(dtype)))


def _open(path: Path) -> BinaryIO:
    """A regular file, not one that a symbolic link names."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise MoeLmError(f"cannot read {path}: {'it is a symbolic link' if path.is_symlink() else error.strerror}; "
                         "copy the checkpoint's files again") from error  # fmt: skip
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MoeLmError(f"cannot read {path}: it is no regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _entry(path: Path, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """A checked line of the header: name, dtype, shape, first byte, last byte + 1."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"tensor {name} has no dtype, shape and data_offsets") from error
    if not all(type(number) is int and number >= 0 for number in numbers) or stop < start:
        raise _broken(path, f"tensor {name} has shape {shape} and bytes {start} to {stop}")
    if dtype not in ITEM_BYTES:
        raise _broken(path, f"tensor {name} has the unknown dtype {dtype!r}")
    if math.prod(shape) * ITEM_BYTES[dtype] != stop - start:
        raise _broken(path, f"tensor {name} of shape {shape} and dtype {dtype} does not fit its {stop - start} bytes")
    return name, dtype, tuple(shape), start, stop


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _broken(path: Path, what: str) -> MoeLmError:
    return MoeLmError(f"{path} is no sound safetensors file: {what}; copy it again")
