"""Tokens read out of files, as one stream."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import OpenFiles
from moe_lm.common.storage import text_of

CHUNK_TOKENS = 1 << 20  # read at once where all of a file is read
_open_files = OpenFiles(64)  # of a process: a run may have thousands


@dataclass(frozen=True, eq=False)
class TokenFile:
    """`size` tokens in a file, behind `offset` bytes; `vocab_size`, if given, bounds them.

    It is opened when it is first read, and closed when others have been read since. It is read and not mapped: where a
    file is cut short, or a disk fails, reading is an error that names the file; in mapped memory it would be SIGBUS,
    which ends a process without a word.
    """

    path: Path
    dtype: np.dtype[Any]
    size: int
    offset: int = 0
    vocab_size: int | None = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(self.size)
        return self.windows(np.array([start]), max(0, stop - start))[0]

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """The windows of `length` tokens that begin at `starts` [n]. Returns [n, length].

        Raises MoeLmError when the file cannot be read or ends too early, and for a token outside the vocabulary.
        """
        result = self._read(starts, length)
        if self.vocab_size is not None and result.size and result.max() >= self.vocab_size:
            row, column = np.unravel_index(int(result.argmax()), result.shape)
            raise MoeLmError(
                f"shard {text_of(self.path)}: token {result[row, column]} at offset {starts[row] + column} is outside "
                f"the vocabulary of {self.vocab_size}; moe-lm data verify looks for more, and moe-lm prepare makes it "
                "anew"
            )
        return result

    def _read(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        result = np.empty((len(starts), length), self.dtype)
        rows = result.view(np.uint8)
        try:
            with _open_files.of(self, lambda: self.path.open("rb", buffering=0)) as file:
                for row, start in zip(rows, starts.tolist(), strict=True):
                    self._fill(file.fileno(), row, self.offset + start * self.dtype.itemsize)
        except OSError as error:
            raise MoeLmError(f"cannot read shard {self.path}: {error.strerror}; bring the file back") from error
        return result

    def chunks(self) -> Iterator[NDArray[Any]]:
        """All tokens in order, CHUNK_TOKENS at a time."""
        for start in range(0, self.size, CHUNK_TOKENS):
            yield self[start : start + CHUNK_TOKENS]

    def _fill(self, descriptor: int, target: NDArray[np.uint8], offset: int) -> None:
        while len(target):
            count = os.preadv(descriptor, [target.data], offset)
            if not count:
                whole = self.offset + self.size * self.dtype.itemsize
                raise MoeLmError(
                    f"shard {self.path} ends before byte {offset} of {whole}: it was cut short after it was opened; "
                    "bring it back, or prepare its source again"
                )
            target, offset = target[count:], offset + count


class TokenStream:
    """Files of tokens, one after the other, as one sequence."""

    def __init__(self, files: Sequence[TokenFile | NDArray[Any]]) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])
        self._dtype = np.result_type(*{file.dtype for file in files}) if files else np.dtype(np.uint16)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start to stop of the whole sequence."""
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        for number in range(first, len(self._files)):
            begin = int(self._bounds[number])
            if begin >= stop:
                break
            pieces.append(self._files[number][max(0, start - begin) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """The windows of `length` tokens that begin at `starts` [n]. Returns [n, length], a copy."""
        if len(self._files) == 1:
            return _windows(self._files[0], starts, length)
        result = np.empty((len(starts), length), self._dtype)
        file_of = np.searchsorted(self._bounds, starts, side="right") - 1
        whole = starts + length <= self._bounds[file_of + 1]
        for number in set(file_of[whole].tolist()):
            rows = np.flatnonzero(whole & (file_of == number))
            result[rows] = _windows(self._files[number], starts[rows] - self._bounds[number], length)
        for row in np.flatnonzero(~whole).tolist():
            result[row] = self.tokens(int(starts[row]), int(starts[row]) + length)
        return result


def _windows(file: TokenFile | NDArray[Any], starts: NDArray[np.int64], length: int) -> NDArray[Any]:
    return file.windows(starts, length) if isinstance(file, TokenFile) else _every_window(file, length)[starts]


def _every_window(tokens: NDArray[Any], length: int) -> NDArray[Any]:
    """A view of every window of `length` tokens: [tokens - length + 1, length]."""
    step = tokens.itemsize  # numpy's own sliding_window_view takes longer to set up than a batch to copy
    return np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens.data, strides=(step, step))
