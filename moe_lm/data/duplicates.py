"""Exact duplicates among the documents of all sources of a config: which documents are left out.

A first pass writes the hash of every document (128 bits of its text), sorted, in a file for each piece. The hashes are
then divided by their first bits into parts that fit in memory, and each part finds what comes a second time. The first
document in the order of the config stays. Both passes are jobs that processes of all hosts do together (crew.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError

from moe_lm.common.files import whole_file
from moe_lm.config.section import Section
from moe_lm.data.crew import PiecesJob, Ranks, Tell, work_on
from moe_lm.text.files import Report
from moe_lm.text.pieces import check_unchanged, stamps_of
from moe_lm.text.sources import read_documents

PART_DOCUMENTS = 1 << 24  # hashes that a process looks through at once, in about 1.5 GB of memory
TOLD_BYTES = 1 << 20
HASHED = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4"), ("size", "<u4")])
MARKED = np.dtype([("piece", "<u4"), ("place", "<u4")])


class HashRecord(Section):
    """What was read of a piece."""

    documents: int
    text_bytes: int
    files: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Hashing(PiecesJob):
    """The job that writes the hashes of a source's documents."""

    def is_still_right(self, number: int) -> bool:
        """Whether a piece is not done, or its files are as they were."""
        try:
            return not self.is_done(number) or self._record(number).files == stamps_of(self.pieces[number])
        except (OSError, ValidationError):
            return False

    def text_bytes(self, number: int) -> int:
        return self._record(number).text_bytes

    def do(self, number: int, tell: Tell, is_mine: Callable[[], bool]) -> None:
        piece, report = self.pieces[number], Report()
        before, digests, sizes, told = stamps_of(piece), bytearray(), list[int](), 0
        for document in read_documents(self.source, report, piece):
            text = document.text.encode()
            digests += xxhash.xxh3_128_digest(text)
            sizes.append(len(text))
            if report.text_bytes - told >= TOLD_BYTES:
                tell(report.text_bytes - told)
                told = report.text_bytes
        check_unchanged(piece, before)
        rows = np.empty(len(sizes), HASHED)
        halves = np.frombuffer(bytes(digests), ">u8").reshape(-1, 2)
        rows["high"], rows["low"] = halves[:, 0], halves[:, 1]
        rows["place"], rows["size"] = np.arange(len(sizes)), sizes
        rows = rows[np.lexsort((rows["low"], rows["high"]))]
        record = HashRecord(documents=len(sizes), text_bytes=report.text_bytes, files=before)
        with whole_file(self.path(number), contested=True) as file:
            file.write_bytes(rows.tobytes())
        with whole_file(self.record_path(number), contested=True) as file:
            file.write_text(record.model_dump_json(), encoding="utf-8")

    def path(self, number: int) -> Path:
        """The file of hashes of a piece."""
        return self.records / f"piece-{number:05d}.hashes"

    def kept(self) -> list[int]:
        """For each piece that is needed how many of its documents are, once all of them are hashed."""
        most, kept, text_bytes = self.max_bytes, list[int](), 0
        for number in range(len(self)):
            if most is not None and text_bytes >= most:
                break
            record = self._record(number)
            if most is not None and text_bytes + record.text_bytes >= most:
                rows = np.fromfile(self.path(number), HASHED)
                sizes = rows["size"][np.argsort(rows["place"])].astype(np.int64)
                kept.append(int(np.count_nonzero(np.cumsum(sizes) - sizes < most - text_bytes)))
            else:
                kept.append(record.documents)
            text_bytes += record.text_bytes
        return kept

    def _record(self, number: int) -> HashRecord:
        return HashRecord.model_validate_json(self.record_path(number).read_bytes())


@dataclass(frozen=True)
class Marking:
    """The job that marks what comes a second time: in each part of the hashes, over the pieces of all sources."""

    hashed: Sequence[tuple[int, Path, int]]  # number of the piece among all, its file, and documents that are kept
    parts: int
    folder: Path
    claims: Path
    max_bytes: int | None = None

    def __len__(self) -> int:
        return self.parts

    def is_done(self, number: int) -> bool:
        return self._path(number).exists()

    def text_bytes(self, number: int) -> int:
        return 0

    def do(self, number: int, tell: Tell, is_mine: Callable[[], bool]) -> None:
        found = [(piece, _part(path, number, self.parts), kept) for piece, path, kept in self.hashed]
        rows = np.concatenate([part[part["place"] < kept] for _, part, kept in found])
        pieces = np.concatenate(
            [np.full(np.count_nonzero(part["place"] < kept), piece, "<u4") for piece, part, kept in found]
        )
        # Equal ones stay in the order of the pieces, and within a piece in that of its documents.
        order = np.lexsort((rows["low"], rows["high"]))
        high, low = rows["high"][order], rows["low"][order]
        again = order[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        marked = np.empty(len(again), MARKED)
        marked["piece"], marked["place"] = pieces[again], rows["place"][again]
        with whole_file(self._path(number), contested=True) as file:
            file.write_bytes(marked[np.lexsort((marked["place"], marked["piece"]))].tobytes())

    def _path(self, number: int) -> Path:
        return _marks_path(self.folder, number)


@dataclass(frozen=True)
class Marks:
    """The documents of a source that are left out."""

    folder: Path
    parts: int
    first_piece: int  # of the source, among the pieces of all

    def of(self, number: int) -> frozenset[int]:
        """The places of documents of a piece, among its documents."""
        piece, places = self.first_piece + number, set[int]()
        for part in range(self.parts):
            marked = _marked(_marks_path(self.folder, part))
            start, stop = np.searchsorted(marked["piece"], [piece, piece + 1])
            places.update(marked["place"][start:stop].tolist())
        return frozenset(places)


def mark(jobs: Sequence[Hashing], folder: Path, claims: Path, workers: int, tell: Tell, ranks: Ranks) -> list[Marks]:
    """Find the duplicates within the documents of sources, in their order, together with the other ranks.

    Raises FileNotFoundError when the other ranks have finished the sources meanwhile.
    """
    for job in jobs:
        for place in (job.records, job.claims):
            place.mkdir(exist_ok=True)
        work_on(job, workers, tell, ranks.look)
    _marked.cache_clear()
    hashed, first, firsts = list[tuple[int, Path, int]](), 0, list[int]()
    for job in jobs:
        hashed += [(first + number, job.path(number), kept) for number, kept in enumerate(job.kept())]
        firsts.append(first)
        first += len(job)
    parts = max(1, -(-sum(kept for _, _, kept in hashed) // PART_DOCUMENTS))
    claims.mkdir(exist_ok=True)
    work_on(Marking(hashed, parts, folder, claims), workers, tell, ranks.look)
    return [Marks(folder, parts, first) for first in firsts]


def _part(path: Path, number: int, parts: int) -> NDArray[Any]:
    """The hashes of a file that fall into a part, by their first 32 bits."""
    if not path.stat().st_size:
        return np.empty(0, HASHED)
    rows = np.memmap(path, HASHED, "r")
    bounds = [-(-(part << 32) // parts) << 32 for part in (number, number + 1)]
    start = np.searchsorted(rows["high"], np.uint64(bounds[0]))
    stop = len(rows) if number + 1 == parts else np.searchsorted(rows["high"], np.uint64(bounds[1]))
    return np.array(rows[start:stop])


@cache
def _marked(path: Path) -> NDArray[Any]:
    return np.memmap(path, MARKED, "r") if path.stat().st_size else np.empty(0, MARKED)


def _marks_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:05d}.marks"
