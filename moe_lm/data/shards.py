"""Token shards on disk: their manifest, opening and checking them, and reading them as one stream.

`<shards>/<source>/` holds `manifest.json` and two kinds of files, numbered for each split. `train-00000.bin` is the
tokens, little-endian uint16 (uint32 when the vocabulary needs it), each document from `<|bos|>` to `<|eos|>`.
`train-00000.index` is two little-endian int64 for each document: its number of tokens and of bytes of text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from moe_lm.common.errors import UsageError
from moe_lm.config.section import Section

if TYPE_CHECKING:
    from moe_lm.tokenizer.tokenizer import Tokenizer

MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype("<i8")
AGAIN = "delete its folder and run moe-lm prepare"
Split = Literal["train", "validation"]


class Shard(Section):
    """One file of tokens and its index. The pattern of `name` keeps paths inside the folder."""

    name: str = Field(pattern=r"^(train|validation)-[0-9]{5}$")
    tokens: int = Field(gt=0)
    documents: int = Field(gt=0)
    text_bytes: int = Field(gt=0)
    sha256: str = Field(description="of the .bin file")
    index_sha256: str = Field(description="of the .index file")


class Manifest(Section):
    """The contents of a folder of shards, and what it was made from."""

    format: Literal[1] = 1
    made_from: dict[str, Any] = Field(description="source, tokenizer and split; other values need other shards")
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    vocab_size: int = Field(gt=0)
    dtype: Literal["<u2", "<u4"]
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    skipped: dict[str, int] = Field(description="documents left out, by reason")
    examples: dict[str, str] = Field(description="the first place of each reason")

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return self.train if split == "train" else self.validation

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.train + self.validation)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.train + self.validation)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.train + self.validation)


def token_dtype(vocab_size: int) -> Literal["<u2", "<u4"]:
    """The smaller of two types that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises UsageError when it is missing or damaged."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{folder} has no readable {MANIFEST} ({error.strerror}); run moe-lm prepare") from error
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "JSON"
        raise UsageError(
            f"{path} is damaged: {field}: {problem['msg']}; delete {folder} and run moe-lm prepare"
        ) from error


class TokenStream:
    """Files of tokens, one after the other, as one sequence."""

    def __init__(self, files: Sequence[NDArray[Any]]) -> None:
        self._files = list(files)
        self._bounds = np.cumsum([0, *(len(file) for file in files)])

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start to stop of the whole sequence."""
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        pieces = []
        for file, begin in zip(self._files[first:], self._bounds[first:].tolist(), strict=False):
            if begin >= stop:
                break
            pieces.append(file[max(0, start - begin) : stop - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def windows(self, starts: NDArray[np.int64], length: int) -> NDArray[Any]:
        """The windows of `length` tokens that begin at `starts` [n]. Returns [n, length], a copy."""
        if len(self._files) == 1:
            return _every_window(self._files[0], length)[starts]
        result = np.empty((len(starts), length), self._files[0].dtype)
        file_of = np.searchsorted(self._bounds, starts, side="right") - 1
        whole = starts + length <= self._bounds[file_of + 1]
        for number in set(file_of[whole].tolist()):
            rows = np.flatnonzero(whole & (file_of == number))
            result[rows] = _every_window(self._files[number], length)[starts[rows] - self._bounds[number]]
        for row in np.flatnonzero(~whole).tolist():
            result[row] = self.tokens(int(starts[row]), int(starts[row]) + length)
        return result


@dataclass(frozen=True)
class TokenShards:
    """One split of one source, memory-mapped.

    files: the token arrays. document_starts: [documents] int64, where each document begins in their sequence.
    document_bytes: [documents] int64, its bytes of UTF-8 text. fingerprint: equal only for equal tokens.
    """

    folder: Path
    split: Split
    files: tuple[NDArray[Any], ...]
    document_starts: NDArray[np.int64]
    document_bytes: NDArray[np.int64]
    fingerprint: str

    @classmethod
    def open(cls, folder: Path, split: Split, verify: bool = True, tokenizer: Tokenizer | None = None) -> TokenShards:
        """Map the shards of a split. `verify` checks every byte against the checksums, and the range of every token.

        Raises UsageError that names the file when one is missing, cut short or altered, and when `tokenizer` is not
        the tokenizer that made the shards.
        """
        manifest = read_manifest(folder)
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
            raise UsageError(
                f"{folder} was made with tokenizer {manifest.tokenizer[:12]}, this one is "
                f"{tokenizer.fingerprint[:12]}; use that tokenizer, or prepare these sources into another data.shards"
            )
        opened = [_open_shard(folder, shard, manifest, verify) for shard in manifest.shards(split)]
        sums = "".join(shard.sha256 + shard.index_sha256 for shard in manifest.shards(split))
        index = np.concatenate([np.empty((0, 2), np.int64), *(index for _, index in opened)])
        return cls(
            folder=folder,
            split=split,
            files=tuple(tokens for tokens, _ in opened),
            document_starts=np.cumsum(index[:, 0]) - index[:, 0],
            document_bytes=index[:, 1].copy(),
            fingerprint=hashlib.sha256(sums.encode()).hexdigest(),
        )

    @property
    def num_tokens(self) -> int:
        return sum(len(file) for file in self.files)

    @property
    def num_documents(self) -> int:
        return len(self.document_starts)

    @property
    def text_bytes(self) -> int:
        """The bytes of UTF-8 text that the tokens were made from."""
        return int(self.document_bytes.sum())

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start to stop, across files."""
        return TokenStream(self.files).tokens(start, stop)


def _open_shard(folder: Path, shard: Shard, manifest: Manifest, verify: bool) -> tuple[NDArray[Any], NDArray[np.int64]]:
    tokens_path, index_path = folder / f"{shard.name}.bin", folder / f"{shard.name}.index"
    tokens = _map(tokens_path, np.dtype(manifest.dtype), shard.tokens)
    index = _map(index_path, INDEX_DTYPE, 2 * shard.documents).reshape(-1, 2)
    if verify:
        _check_sum(tokens_path, tokens, shard.sha256)
        _check_sum(index_path, index, shard.index_sha256)
        largest = int(tokens.argmax())
        if tokens[largest] >= manifest.vocab_size:
            raise UsageError(
                f"{tokens_path}: token {tokens[largest]} at offset {largest} is outside the vocabulary of "
                f"{manifest.vocab_size}; {AGAIN}"
            )
    if int(index[:, 0].sum()) != shard.tokens or index.min() < 0:
        raise UsageError(f"{index_path} does not add up to the {shard.tokens} tokens of its shard; {AGAIN}")
    return tokens, index


def _map(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    if path.is_symlink() or not path.is_file():
        problem = "is a symbolic link" if path.is_symlink() else "is missing"
        raise UsageError(f"shard {path} {problem}, expected a file of {count * dtype.itemsize} bytes; {AGAIN}")
    size = path.stat().st_size
    if size != count * dtype.itemsize:
        raise UsageError(f"shard {path} has {size} bytes, expected {count * dtype.itemsize}; {AGAIN}")
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _check_sum(path: Path, data: NDArray[Any], expected: str) -> None:
    found = hashlib.sha256(data.data).hexdigest()
    if found != expected:
        raise UsageError(f"shard {path} is corrupt: sha256 {found[:12]}, expected {expected[:12]}; {AGAIN}")


def _every_window(tokens: NDArray[Any], length: int) -> NDArray[Any]:
    """A view of every window of `length` tokens: [tokens - length + 1, length]."""
    step = tokens.itemsize  # numpy's own sliding_window_view takes longer to set up than a batch to copy
    return np.ndarray((len(tokens) - length + 1, length), tokens.dtype, tokens.data, strides=(step, step))
