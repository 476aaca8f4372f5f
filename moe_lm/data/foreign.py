"""A source of token files that other programs wrote: a manifest of ranges of these files, which stay where they are.

Every byte is read once. While its checksum is computed, its ids are checked against the tokenizer's vocabulary, and the
ends of documents against its eos token, behind which training begins a document.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.integrity import KINDS, XXH3
from moe_lm.config.data import DataConfig, SourceConfig, TokenFiles
from moe_lm.data.shards import VERIFIERS, Manifest, Shard, Split
from moe_lm.data.stream import CHUNK_TOKENS
from moe_lm.data.token_files import UINT16, Located, find, locate, with_held_out
from moe_lm.tokenizer.tokenizer import Tokenizer

Progress = Callable[[int, int | None], None]  # bytes that are done, and all of them
Files = dict[Split, list[Path]]

MOST_UNMARKED = 0.5  # of the documents that an index counts, may end without the eos token
MUCH_UNUSED = 0.25  # of a vocabulary whose largest ids never come
TIMES_READ = 100  # tokens for each id of a vocabulary, of which nearly all come then


class Range(NamedTuple):
    """The tokens start to stop of a file, which become a shard."""

    located: Located
    start: int
    stop: int

    def __str__(self) -> str:
        whole = (self.start, self.stop) == (0, self.located.tokens)
        return str(self.located.path) + ("" if whole else f", ids {self.start} to {self.stop}")


class Seen(NamedTuple):
    """What reading a range has shown: `counted` documents end in it by an index, `ended` of them with eos."""

    checksum: str
    largest: int
    eos: int
    is_ended: bool  # by eos
    counted: int | None  # None: no index
    ended: int


Read = dict[Split, list[tuple[Range, Seen]]]


def files_of(source: TokenFiles) -> Files:
    """The files of a source, by split. Raises UsageError for one that is missing or comes twice."""
    if source.validation is not None:
        train, held_out = find(source.path), find(source.validation)
    else:
        train, held_out = with_held_out(source.path)
    known: dict[tuple[int, int], Path] = {}
    for file in (*train, *held_out):
        try:
            status = file.stat()
        except OSError as error:
            raise UsageError(f"cannot read token file {file}: {error.strerror}; bring it back") from error
        other = known.setdefault((status.st_dev, status.st_ino), file)
        if other is not file:
            again = "is in training and held out" if file in held_out and other in train else "comes twice"
            raise UsageError(f"{file} {again}, the other time as {other}; name each file once")
    return {"train": train, "validation": held_out}


def made_from(source: TokenFiles, files: Files, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that the manifest depends on; files count by name and size."""
    made: dict[str, Any] = {"token_files": source.path, "dtype": source.dtype, "tokenizer": tokenizer.fingerprint}
    for split, paths in files.items():
        listing = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        made[split] = f"{len(paths)} with names and sizes of sha256 {digest}"
    return made | ({} if files["validation"] else {"validation_fraction": validation_fraction})


def manifest_of(
    source: SourceConfig, files: Files, config: DataConfig, tokenizer: Tokenizer, folder: Path, progress: Progress
) -> Manifest:
    """The manifest, in `folder`, of a source of token files.

    Raises UsageError for files that are damaged, hold ids that the tokenizer does not have, hold the same tokens twice,
    or do not mark where documents end although `separate_documents` asks for it.
    """
    assert source.tokens is not None
    ranges = _ranges(source.tokens, files, config.validation_fraction, tokenizer)
    read = _read(ranges, tokenizer, progress)
    every = [item for items in read.values() for item in items]
    _check_no_copies(every)
    if config.separate_documents:
        _check_ends(source.name, every, tokenizer)
    is_absolute = Path(source.tokens.path).expanduser().is_absolute()
    shards = {split: tuple(_shards(split, items, None if is_absolute else folder)) for split, items in read.items()}
    return Manifest(
        made_from=made_from(source.tokens, files, config.validation_fraction, tokenizer),
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        dtype="<u2" if every[0][0].located.dtype == UINT16 else "<u4",
        train=shards["train"],
        validation=shards["validation"],
        skipped={},
        examples={},
        notes=tuple(_notes(every, tokenizer)),
    )


def _shards(split: Split, items: Sequence[tuple[Range, Seen]], folder: Path | None) -> Iterator[Shard]:
    """The shards of a split; their files are named from `folder`, if given, as then all may be moved together."""
    for number, (part, seen) in enumerate(items):
        path = part.located.path
        yield Shard(
            name=f"{split}-{number:05d}",
            file=str(path) if folder is None else os.path.relpath(path, folder.resolve()),
            offset=part.located.file(part.start).offset,
            tokens=part.stop - part.start,
            documents=seen.eos + (not seen.is_ended),
            text_bytes=None,
            xxh3_128=seen.checksum,
        )


def _ranges(
    source: TokenFiles, files: Files, validation_fraction: float, tokenizer: Tokenizer
) -> dict[Split, list[Range]]:
    """The tokens of each split."""
    flat = None if source.dtype is None else np.dtype(source.dtype).newbyteorder("<")
    located = {split: [locate(path, flat, tokenizer.vocab_size) for path in paths] for split, paths in files.items()}
    every = [item for items in located.values() for item in items]
    if len({item.dtype for item in every}) > 1:
        one, other = every[0], next(item for item in every if item.dtype != every[0].dtype)
        raise UsageError(
            f"{one.path} has ids of type {one.dtype.name} and {other.path} {other.dtype.name}; give each type a source"
        )
    if not any(item.tokens for item in located["train"]):
        raise UsageError(f"the token files at {source.path} are empty; expected at least one with ids")
    train, held_out = ([Range(item, 0, item.tokens) for item in located[split]] for split in located)
    if not held_out and validation_fraction:
        train, held_out = _with_tail(train, validation_fraction, tokenizer.eos_id)
    ranges: dict[Split, list[Range]] = {
        "train": [part for part in train if part.stop], "validation": [part for part in held_out if part.stop]
    }  # fmt: skip
    if not ranges["train"]:
        raise UsageError(
            f"data.validation_fraction={validation_fraction} holds out all of {source.path}; hold out less, or name "
            "files of held-out tokens as validation"
        )
    return ranges


def _with_tail(parts: Sequence[Range], fraction: float, eos_id: int) -> tuple[list[Range], list[Range]]:
    """The ranges without their last tokens, and these: about so large a share, from the end of a document on."""
    total = sum(part.stop for part in parts)
    cut = total - max(1, round(total * fraction))
    train: list[Range] = []
    for number, part in enumerate(parts):
        if cut < part.stop:
            place = _document_end(part.located, cut, eos_id)
            split = [Range(part.located, 0, place), Range(part.located, place, part.stop)]
            kept, held_out = ([item] if item.stop > item.start else [] for item in split)
            return [*train, *kept], [*held_out, *parts[number + 1 :]]
        train.append(part)
        cut -= part.stop
    raise AssertionError  # never reached: the cut is before the last token


def _document_end(located: Located, near: int, eos_id: int) -> int:
    """The first place from `near` on that is behind an eos, else the last before; `near` where none is close."""
    start, stop = max(0, near - CHUNK_TOKENS), min(located.tokens, near + CHUNK_TOKENS)
    ends = start + 1 + np.flatnonzero(located.file()[start:stop] == eos_id)
    ends = ends[ends < located.tokens]
    if not near or not ends.size:
        return near
    later = ends[ends >= near]
    return int(later[0] if later.size else ends[-1])


def _read(ranges: Mapping[Split, Sequence[Range]], tokenizer: Tokenizer, progress: Progress) -> Read:
    """Every range with what reading it has shown. Several are read at the same time."""
    every = [part for parts in ranges.values() for part in parts]
    total = sum((part.stop - part.start) * part.located.dtype.itemsize for part in every)
    lock, stopped, done = threading.Lock(), threading.Event(), 0

    def tell(size: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise MoeLmError("stopped, as another file cannot be read")
        with lock:
            done += size
            progress(done, total)

    with ThreadPoolExecutor(VERIFIERS) as pool:
        futures = [pool.submit(_read_range, part, tokenizer, tell) for part in every]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in futures if future.done() and future.exception() is not None), None)
            seen = iter([future.result() for future in ([failed] if failed else futures)])
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {split: list(zip(parts, seen, strict=False)) for split, parts in ranges.items()}


def _read_range(part: Range, tokenizer: Tokenizer, tell: Callable[[int], None]) -> Seen:
    located, start, stop = part
    digest, largest, eos, counted, ended, last = KINDS[XXH3](), 0, 0, 0, 0, -1
    most = min(located.most, tokenizer.vocab_size - 1)
    ends = None if located.ends is None else _Ends(located.ends(), start)
    for tokens in located.file(start, stop).chunks():
        digest.update(tokens.data)
        tell(tokens.nbytes)
        largest = max(largest, int(tokens.max()))
        if largest > most:
            place = start + int(np.argmax(tokens > most))
            raise UsageError(_no_such_id(located, place, int(tokens[place - start]), tokenizer.vocab_size))
        is_eos = tokens == tokenizer.eos_id
        eos += int(np.count_nonzero(is_eos))
        last, start = int(tokens[-1]), start + len(tokens)
        if ends is not None:
            places = ends.until(start) - (start - len(tokens))
            counted, ended = counted + len(places), ended + int(np.count_nonzero(is_eos[places - 1]))
    return Seen(digest.hexdigest(), largest, eos, last == tokenizer.eos_id, None if ends is None else counted, ended)


def _no_such_id(located: Located, place: int, token: int, vocab_size: int) -> str:
    byte = located.offset + place * located.dtype.itemsize
    value = f"{token}" if token <= located.most else f"{token - 2 * (located.most + 1)}"
    return (
        f"{located.path}: id {value} at token {place} (byte {byte}) is outside the vocabulary of {vocab_size}, read as "
        f"{located.kind} {located.dtype.name}; give the tokenizer that wrote the file, or another dtype"
    )


class _Ends:
    """The ends of documents behind `start`, given in order; those of empty documents are left out."""

    def __init__(self, parts: Iterator[NDArray[np.int64]], start: int) -> None:
        self._parts, self._ahead, self._last = parts, np.empty(0, np.int64), start

    def until(self, stop: int) -> NDArray[np.int64]:
        """Those up to `stop`, without those given before."""
        found = [self._ahead]
        while not found[-1].size or found[-1][-1] <= stop:
            part = next(self._parts, None)
            if part is None:
                break
            part = part[part > self._last]
            part = part[np.diff(part, prepend=self._last) > 0]
            if part.size:
                self._last = int(part[-1])
                found.append(part)
        every = np.concatenate(found)
        count = int(np.searchsorted(every, stop, side="right"))
        self._ahead = every[count:]
        return every[:count]


def _check_no_copies(every: Iterable[tuple[Range, Seen]]) -> None:
    known: dict[str, Range] = {}
    for part, seen in every:
        other = known.setdefault(seen.checksum, part)
        if other is not part:
            raise UsageError(f"{part} holds the same tokens as {other}; name one of them")


def _check_ends(name: str, every: Sequence[tuple[Range, Seen]], tokenizer: Tokenizer) -> None:
    """Raise UsageError where documents do not end with eos, and training could not tell where one begins."""
    cure = (
        "training cannot tell where a document begins; set data.separate_documents=false to let documents in a row "
        "attend to each other, or write the files again with that token behind each"
    )
    eos = f"the tokenizer's eos, id {tokenizer.eos_id}"
    counted = sum(seen.counted or 0 for _, seen in every)
    ended = sum(seen.ended for _, seen in every)
    if counted and ended < MOST_UNMARKED * counted:
        raise UsageError(f"source {name!r}: {ended:,} of {counted:,} documents end with {eos}, so {cure}")
    if not any(seen.eos for _, seen in every):
        raise UsageError(
            f"source {name!r}: its token files hold no eos of the tokenizer, id {tokenizer.eos_id}, so {cure}"
        )


def _notes(every: Sequence[tuple[Range, Seen]], tokenizer: Tokenizer) -> Iterator[str]:
    """What tells whether the tokenizer is that of the files."""
    kinds = ", ".join(sorted({f"{part.located.kind} {part.located.dtype.name}" for part, _ in every}))
    files = len({part.located.path for part, _ in every})
    largest, eos = max(seen.largest for _, seen in every), sum(seen.eos for _, seen in every)
    tokens = sum(part.stop - part.start for part, _ in every)
    plural = "s" * (files != 1)
    yield f"read in place: {files} file{plural} ({kinds}); largest id {largest:,} of {tokenizer.vocab_size:,}"
    counted, ended = sum(seen.counted or 0 for _, seen in every), sum(seen.ended for _, seen in every)
    if counted:
        yield f"{ended / counted:.1%} of {counted:,} documents end with eos (id {tokenizer.eos_id})"
        if eos > ended:
            yield f"warning: eos comes {eos - ended:,} times within documents, where training begins another document"
        if ended < counted:
            yield f"warning: {counted - ended:,} documents do not end with eos, and run on into the next in training"
    elif eos:
        yield f"eos (id {tokenizer.eos_id}) comes every {tokens / eos:,.0f} tokens"
    else:
        yield f"warning: eos (id {tokenizer.eos_id}) never comes; documents in a row attend to each other"
    if largest < (1 - MUCH_UNUSED) * tokenizer.vocab_size and tokens > TIMES_READ * tokenizer.vocab_size:
        yield "warning: a quarter of the vocabulary never comes; is this the tokenizer that wrote the files?"
