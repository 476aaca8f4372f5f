"""Token shards on disk: their manifest, opening them, and checking them.

`<shards>/<source>/` holds `manifest.json` and two kinds of files, numbered for each split. `train-00000.bin` is the
tokens, little-endian uint16 (uint32 when the vocabulary needs it), each document from `<|bos|>` to `<|eos|>`.
`train-00000.index` is two little-endian int64 for each document: its number of tokens and of bytes of text. A shard may
also be a range of a file that another program wrote, anywhere; it has no index.

Manifests of format 2 are written; those of format 1, which had SHA-256 and no ids of marks, are read as well.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, model_validator

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import read_regular
from moe_lm.common.integrity import KINDS, SHA256, XXH3
from moe_lm.config.data import OnDamage
from moe_lm.config.section import Section
from moe_lm.data.advice import again, no_shards
from moe_lm.data.cache import ShardCache, token_file
from moe_lm.data.marks import Marks
from moe_lm.data.stream import CHUNK_TOKENS, TokenFile, TokenStream

if TYPE_CHECKING:
    from moe_lm.tokenizer.tokenizer import Tokenizer

MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype("<i8")
MAX_MANIFEST_BYTES = 1 << 28  # of a million shards
VERIFIERS = len(os.sched_getaffinity(0))  # threads that verify shards side by side
Split = Literal["train", "validation"]


class Shard(Section):
    """One file of tokens and its index. The pattern of `name` keeps paths inside the folder."""

    name: str = Field(pattern=r"^(train|validation)-[0-9]{5,8}$")
    tokens: int = Field(gt=0)
    documents: int | None = Field(gt=0, description="null: unknown")
    text_bytes: int | None = Field(gt=0, description="null: unknown")
    file: str | None = Field(default=None, description="file of the tokens, seen from the folder; null: NAME.bin")
    offset: int = Field(default=0, ge=0, description="bytes of the file before the first token")
    xxh3_128: str | None = Field(default=None, description="of the tokens")
    sha256: str | None = Field(default=None, description="of the tokens, in format 1")
    index_xxh3_128: str | None = Field(default=None, description="of the .index file, if there is one")
    index_sha256: str | None = Field(default=None, description="of the .index file, in format 1")

    @model_validator(mode="after")
    def _has_a_checksum(self) -> Self:
        if (self.xxh3_128 is None) == (self.sha256 is None):
            raise ValueError(f"expected one of {XXH3} and {SHA256}")
        return self

    @property
    def checksum(self) -> tuple[str, str]:
        """The kind and the value of the checksum of the tokens."""
        return (XXH3, self.xxh3_128) if self.xxh3_128 is not None else (SHA256, self.sha256 or "")

    @property
    def index_checksum(self) -> tuple[str, str] | None:
        """The kind and the value of the checksum of the index; None if there is no index."""
        if self.index_xxh3_128 is not None:
            return XXH3, self.index_xxh3_128
        return None if self.index_sha256 is None else (SHA256, self.index_sha256)

    def path(self, folder: Path) -> Path:
        """The file of the tokens."""
        return folder / (self.file or f"{self.name}.bin")


class Manifest(Section):
    """The contents of a folder of shards, and what it was made from."""

    format: Literal[1, 2] = 2
    made_from: dict[str, Any] = Field(description="source, tokenizer and split; other values need other shards")
    tokenizer: str = Field(description="fingerprint of the tokenizer")
    vocab_size: int = Field(gt=0)
    dtype: Literal["<u2", "<u4"]
    bos_id: int | None = Field(default=None, ge=0, description="begins every document; null: nothing does")
    eos_id: int | None = Field(
        default=None, ge=0, description="ends every document; null, in format 1: the tokenizer's"
    )
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    skipped: dict[str, int] = Field(description="documents left out, by reason")
    examples: dict[str, str] = Field(description="the first place of each reason")
    notes: tuple[str, ...] = Field(default=(), description="what else prepare says of the source")

    @model_validator(mode="after")
    def _shards_differ(self) -> Self:
        size, shards = np.dtype(self.dtype).itemsize, self.train + self.validation
        if double := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
            raise ValueError(f"shard {double[0]} is there twice")
        ranges = sorted((shard.file, shard.offset, shard.name, shard.tokens) for shard in shards if shard.file)
        for (file, offset, name, tokens), (other, begin, next_name, _) in pairwise(ranges):
            if file == other and begin < offset + tokens * size:
                raise ValueError(f"shards {name} and {next_name} overlap in {file} at byte {begin}")
        return self

    def shards(self, split: Split) -> tuple[Shard, ...]:
        return self.train if split == "train" else self.validation

    def fingerprint(self, split: Split) -> str:
        """That of the split's `TokenShards`, if no shard of it is left out."""
        return fingerprint_of(self.shards(split))

    @property
    def documents(self) -> int | None:
        return _sum_of_known(shard.documents for shard in self.train + self.validation)

    @property
    def text_bytes(self) -> int | None:
        return _sum_of_known(shard.text_bytes for shard in self.train + self.validation)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.train + self.validation)


def token_dtype(vocab_size: int) -> Literal["<u2", "<u4"]:
    """The smaller of two types that holds every id."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def fingerprint_of(shards: Iterable[Shard]) -> str:
    """Equal only for equal tokens in the same shards."""
    sums = (sum_[1] for shard in shards for sum_ in (shard.checksum, shard.index_checksum) if sum_ is not None)
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _sum_of_known(counts: Iterable[int | None]) -> int | None:
    """Their sum; None if one is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)


def is_prepared(folder: Path) -> bool:
    """Whether a folder, here or in a store, has shards."""
    return storage.exists(folder / MANIFEST) if storage.is_remote(folder) else (folder / MANIFEST).is_file()


def manifest_bytes(folder: Path) -> bytes:
    """The manifest of a folder, here or in a store, as it was written."""
    path = folder / MANIFEST
    return storage.read_bytes(path) if storage.is_remote(folder) else read_regular(path, MAX_MANIFEST_BYTES)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises UsageError when it is missing or damaged."""
    path = folder / MANIFEST
    if not is_prepared(folder):
        raise UsageError(no_shards(folder, MANIFEST))
    try:
        return Manifest.model_validate_json(manifest_bytes(folder))
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "JSON"
        raise UsageError(f"{storage.text_of(path)} is damaged: {field}: {problem['msg']}; {again(folder)}") from error


@dataclass(frozen=True)
class LeftOut:
    """The shards of a split that are left out: their `damage` by name, and the tokens that are lost with them."""

    folder: Path
    split: Split
    damage: dict[str, str]
    tokens: int
    of_shards: int
    of_tokens: int

    def __str__(self) -> str:
        return (
            f"{len(self.damage)} of the {self.of_shards} {self.split} shards in {self.folder} are left out, as "
            f"data.on_damage=leave_out asks, with {self.tokens:,} of {self.of_tokens:,} tokens "
            f"({self.tokens / self.of_tokens:.2%}): {'; '.join(self.damage.values())}"
        )


@dataclass(frozen=True)
class TokenShards:
    """One split of one source: its tokens are read when they are asked for.

    files: the tokens. marks: the ids between documents. fingerprint: equal only for equal tokens. shards: what the
    manifest says of each file. left_out: what damage has taken, if anything.
    """

    folder: Path
    split: Split
    files: tuple[TokenFile | NDArray[Any], ...]
    marks: Marks
    fingerprint: str
    shards: tuple[Shard, ...] = ()
    left_out: LeftOut | None = None

    @classmethod
    def open(
        cls,
        folder: Path,
        split: Split,
        verify: bool = False,
        tokenizer: Tokenizer | None = None,
        on_damage: OnDamage = "stop",
        sizes: bool = True,
        damage: Mapping[str, str] | None = None,
        cache: ShardCache | None = None,
        manifest: Manifest | None = None,
    ) -> TokenShards:
        """Open the shards of a split: read the manifest, and with `sizes` look for each file and its size.

        `verify` checks every byte against the checksums, and the range of every token. `damage` has what `damages` has
        found elsewhere. Raises UsageError that names the file when one is missing, cut short or altered, and it is not
        to be left out, and when `tokenizer` is not the tokenizer that made the shards. A folder in a store is read
        through `cache`. A `manifest` is one that has been read.
        """
        manifest = manifest or read_manifest(folder)
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer:
            raise UsageError(
                f"{folder} was made with tokenizer {manifest.tokenizer[:12]}, this one is "
                f"{tokenizer.fingerprint[:12]}; use that tokenizer, or prepare these sources into another data.shards"
            )
        vocab_size, shards = _vocab_size(manifest, tokenizer), manifest.shards(split)
        if damage is None:
            damage = damages(folder, split, tokenizer, verify, manifest=manifest) if sizes or verify else {}
        if damage and on_damage == "stop":
            raise UsageError(f"{next(iter(damage.values()))}; {again(folder)}, or set data.on_damage=leave_out")
        sound, dtype = tuple(shard for shard in shards if shard.name not in damage), np.dtype(manifest.dtype)
        return cls(
            folder=folder,
            split=split,
            files=tuple(_token_file(folder, shard, dtype, vocab_size, cache) for shard in sound),
            marks=_marks(folder, manifest, tokenizer),
            fingerprint=fingerprint_of(sound),
            shards=sound,
            left_out=_left_out(folder, split, shards, damage) if damage else None,
        )

    @property
    def num_tokens(self) -> int:
        return sum(len(file) for file in self.files)

    @property
    def num_documents(self) -> int | None:
        return _sum_of_known(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int | None:
        """The bytes of UTF-8 text that the tokens were made from; None if they are unknown."""
        return _sum_of_known(shard.text_bytes for shard in self.shards)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens start to stop, across files."""
        return TokenStream(self.files).tokens(start, stop)

    def documents(self) -> Iterator[NDArray[Any]]:
        """The documents as training divides them; only one, and what is read at once, is in memory."""
        last: NDArray[Any] | None = None  # what has been read of a document, up to the end of a chunk
        for file in self.files:
            for start in range(0, len(file), CHUNK_TOKENS):
                tokens = file[start : start + CHUNK_TOKENS]
                tokens = tokens if last is None else np.concatenate([last, tokens])
                *whole, last = np.split(tokens, np.flatnonzero(self.marks.begins(tokens[None])[0]) + 1)
                yield from whole
        if last is not None:
            yield last


def _token_file(
    folder: Path, shard: Shard, dtype: np.dtype[Any], vocab_size: int | None = None, cache: ShardCache | None = None
) -> TokenFile:
    kind, checksum = shard.checksum
    known = None if shard.file is not None else {kind: checksum}  # that of a range says nothing of the whole file
    return token_file(shard.path(folder), dtype, shard.tokens, shard.offset, vocab_size, cache, known)


def _vocab_size(manifest: Manifest, tokenizer: Tokenizer | None) -> int:
    return manifest.vocab_size if tokenizer is None else min(manifest.vocab_size, tokenizer.vocab_size)


def _marks(folder: Path, manifest: Manifest, tokenizer: Tokenizer | None) -> Marks:
    """Those of the manifest; of format 1, the tokenizer's, or else the first and the last token."""
    if manifest.eos_id is not None:
        return Marks(manifest.bos_id, manifest.eos_id)
    if tokenizer is not None:
        return Marks(tokenizer.bos_id, tokenizer.eos_id)
    shard = next(iter(manifest.train + manifest.validation), None)
    if shard is None:
        return Marks(None, 0)
    file = _token_file(folder, shard, np.dtype(manifest.dtype))
    return Marks(int(file[0:1][0]), int(file[shard.tokens - 1 : shard.tokens][0]))


def read_index(folder: Path, shards: Iterable[Shard]) -> NDArray[np.int64]:
    """Tokens and bytes of text of every document of these shards, verified. [documents, 2]"""
    return np.concatenate([np.empty((0, 2), np.int64), *(_read_index(folder, shard) for shard in shards)])


def damages(
    folder: Path,
    split: Split,
    tokenizer: Tokenizer | None = None,
    verify: bool = False,
    share: slice = slice(None),
    progress: Callable[[int], object] = lambda tokens: None,
    manifest: Manifest | None = None,
) -> dict[str, str]:
    """What is wrong with shards of a split, by name: with their size, and with `verify`, with their contents.

    `share` selects the shards to look at; other ranks look at the rest. `progress` is told of tokens that are done.
    """
    manifest = manifest or read_manifest(folder)
    dtype, vocab_size = np.dtype(manifest.dtype), _vocab_size(manifest, tokenizer)
    stored = {file.name: file.size for file in storage.find(folder)} if storage.is_remote(folder) else None

    def damage_in(shard: Shard) -> str | None:
        try:
            expected = shard.offset + shard.tokens * dtype.itemsize
            _check_size(shard.path(folder), expected, shard.file is None, stored)
            if verify:
                _read_index(folder, shard)
                _check_tokens(_token_file(folder, shard, dtype), shard, vocab_size)
        except MoeLmError as error:
            return str(error)
        progress(shard.tokens)
        return None

    shards = manifest.shards(split)[share]
    with ThreadPoolExecutor(VERIFIERS) as pool:
        found = list(zip(shards, pool.map(damage_in, shards), strict=True))
    return {shard.name: damage for shard, damage in found if damage is not None}


def _left_out(folder: Path, split: Split, shards: Sequence[Shard], damage: Mapping[str, str]) -> LeftOut:
    tokens = {shard.name: shard.tokens for shard in shards}
    lost = sum(tokens[name] for name in damage)
    return LeftOut(folder, split, dict(damage), lost, len(tokens), sum(tokens.values()))


def _check_size(path: Path, expected: int, is_ours: bool = True, stored: Mapping[str, int] | None = None) -> None:
    """Another program's file may hold more, and be a symbolic link. `stored` are the sizes in a folder of a store."""
    is_link = is_ours and path.is_symlink()
    if is_link or not (path.is_file() if stored is None else path.name in stored):
        problem = "is a symbolic link" if is_link else "is missing"
        raise UsageError(f"shard {path} {problem}, expected a file of {expected} bytes")
    size = path.stat().st_size if stored is None else stored[path.name]
    if size < expected or (is_ours and size > expected):
        raise UsageError(f"shard {path} has {size} bytes, expected {expected}")


def _read_index(folder: Path, shard: Shard) -> NDArray[np.int64]:
    """The verified index of a shard, [documents, 2], empty if it has none. It is small beside the tokens."""
    if shard.index_checksum is None or shard.documents is None:
        return np.empty((0, 2), np.int64)
    path, expected = folder / f"{shard.name}.index", 2 * INDEX_DTYPE.itemsize * shard.documents
    if storage.is_remote(path):
        content = storage.read_bytes(path)
    else:
        _check_size(path, expected)
        content = read_regular(path, expected)
    kind, checksum = shard.index_checksum
    _check_sum(path, kind, KINDS[kind](content).hexdigest(), checksum)
    index = np.frombuffer(content, INDEX_DTYPE).reshape(-1, 2)
    if index.min() < 0 or sum(index[:, 0].tolist()) != shard.tokens:
        raise UsageError(f"{path} does not add up to the {shard.tokens} tokens of its shard")
    return index


def _check_tokens(file: TokenFile, shard: Shard, vocab_size: int) -> None:
    """Check sum and range in one pass."""
    kind, checksum = shard.checksum
    digest, outside = KINDS[kind](), None
    for number, tokens in enumerate(file.chunks()):
        digest.update(tokens.data)
        if outside is None and tokens.max() >= vocab_size:
            place = int(tokens.argmax())
            outside = f"token {tokens[place]} at offset {number * CHUNK_TOKENS + place}"
    _check_sum(file.path, kind, digest.hexdigest(), checksum)
    if outside is not None:
        raise UsageError(f"{file.path}: {outside} is outside the vocabulary of {vocab_size}")


def _check_sum(path: Path, kind: str, found: str, expected: str) -> None:
    if found != expected:
        raise UsageError(f"shard {path} is corrupt: {kind} {found[:12]}, expected {expected[:12]}")
