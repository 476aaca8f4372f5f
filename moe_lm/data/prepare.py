"""Documents -> token shards, tokenized by several processes; a run that was killed goes on where it stopped.

A source is divided into pieces (text/pieces.py). Processes of all hosts (crew.py) turn each into shards (chunks.py),
and the manifest, written last, makes the folder complete. The bytes of the shards depend neither on the number of
processes nor on interruptions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_lm.common import storage
from moe_lm.common.environment import Machine
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import UNFINISHED, try_lock, whole_file
from moe_lm.common.process import cores
from moe_lm.config.data import DataConfig, SourceConfig
from moe_lm.data import advice, duplicates, foreign
from moe_lm.data.chunks import Record, Task, joined, read_record, write_piece
from moe_lm.data.crew import Claims, Ranks, beating, work_on
from moe_lm.data.duplicates import Hashing, Marks
from moe_lm.data.report import PrepareReport
from moe_lm.data.shards import MANIFEST, Manifest, read_manifest, token_dtype
from moe_lm.text import pieces
from moe_lm.text.files import Piece, kind_of
from moe_lm.text.pieces import divide
from moe_lm.text.sources import ROW_SUFFIXES, TEXT_SUFFIXES, Report, no_usable_document, source_files
from moe_lm.text.split import hashes_below, held_out_below
from moe_lm.tokenizer.tokenizer import Tokenizer

WORK_FORMAT = 3  # of records and pieces: other work is not gone on with
AGAIN = 10_000_000  # added to the number of a piece for the names of its shards
SECONDS_TO_APPEAR = 10.0  # for a folder on the network
DUPLICATES = "duplicates"  # the folder of hashes and marks in that of records

Progress = Callable[[int, int | None], None]  # bytes of a source's text that are done, and all of them if known


def prepare(config: DataConfig, progress: Progress | None = None, ranks: Ranks | None = None) -> PrepareReport:
    """Write the shards of every source that has none yet, together with the other `ranks`.

    Raises UsageError for a source that is missing or empty, for shards made from something else and for a folder that
    the ranks do not share, MoeLmError when the shards cannot be written.
    """
    if storage.is_remote(config.shards):
        url = storage.text_of(config.shards)
        raise UsageError(
            f"data.shards={url} is in a store, and shards are written to a disk; {advice.into_store(config.shards)}"
        )
    ranks = ranks or Ranks()
    tokenizer = Tokenizer.load(config.tokenizer)
    sources = list[_Source]()
    for of in config.sources:
        sources.append(_Source(config, of, tokenizer, sources))
    with ExitStack() as stack:
        session = _begin(sources, stack) if ranks.rank == 0 else ""
        session, were_there = json.loads(ranks.first(json.dumps([session, [s.name for s in sources if s.is_done]])))
        places = [source.work / session for source in sources if source.name not in were_there]
        are_there = all(_appears(place) for place in places)
        ranks.check_same({"the folders of rank 0 in data.shards": "there" if are_there else "not there"})
        every = Machine(cores(), ranks.on_this_host).cores_of_rank
        workers = max(1, config.workers // ranks.on_this_host) if config.workers else every
        marks = _marks(sources, were_there, session, workers, ranks) if config.drop_duplicates else {}
        manifests, died = dict[str, Manifest](), 0
        for source in sources:
            if source.name not in were_there:
                tell = progress or (lambda done, total: None)
                died += _tokenize(source, session, marks.get(source.name), workers, tell, ranks)
            manifests[source.name] = read_manifest(source.folder)
    files = {source.name: _text_files(source.config) for source in sources}
    return PrepareReport(manifests, files, config.validation_fraction, frozenset(were_there), died)


class _Source:
    """A source with its files, its folder of shards and the folder of its records."""

    def __init__(self, data: DataConfig, config: SourceConfig, tokenizer: Tokenizer, before: Sequence[_Source]) -> None:
        self.data, self.config, self.tokenizer, self.name = data, config, tokenizer, config.name
        self.listed = Report()  # what lies among the files and is no text
        self.folder = data.shards / config.name
        self.files: list[tuple[str, Path]] = []
        self.made_from: dict[str, Any]
        if config.tokens is not None:
            self.token_files = foreign.files_of(config.tokens)
            self.made_from = foreign.made_from(config.tokens, self.token_files, data.validation_fraction, tokenizer)
        else:
            self.files = [] if config.dataset is not None else source_files(config, self.listed)
            self.made_from = _made_from(self)
            if data.drop_duplicates:
                self.made_from["drop_duplicates"] = _looked_at([of for of in before if of.is_text])
        sizes = pieces.SMALLEST, pieces.MOST, pieces.LARGEST
        key = json.dumps([WORK_FORMAT, sizes, self.made_from], sort_keys=True)
        self.work = self.folder / f".work-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.is_done = (self.folder / MANIFEST).exists()

    @property
    def is_text(self) -> bool:
        return self.config.tokens is None

    @cached_property
    def pieces(self) -> list[Piece]:
        return divide(self.config, self.files)

    def task(self, session: str, marks: Marks | None) -> Task:
        limit = hashes_below(self.data.validation_fraction)
        return Task(
            source=self.config,
            pieces=self.pieces,
            tokenizer=self.data.tokenizer,
            fingerprint=self.tokenizer.fingerprint,
            folder=self.folder,
            records=self.work,
            claims=self.work / session,
            held_out_below=limit,
            marks=marks,
        )


def _begin(sources: Sequence[_Source], stack: ExitStack) -> str:
    """Hold the folders against other jobs, make room in them, and return the name of this session."""
    session = f"session-{uuid.uuid4().hex}"
    for source in sources:
        if source.is_done:
            _check_same(source.folder, read_manifest(source.folder).made_from, source.made_from)
            _remove_work(source.folder)
            continue
        with _writing(source.folder):
            stack.enter_context(_only_writer(source.folder))
            if not source.work.exists():  # shards of something else, which nobody finished
                _remove_shards(source.folder, keep=())
            _remove_work(source.folder, keep=source.work)
            for leftover in [*source.folder.glob(f"*{UNFINISHED}"), *source.work.glob("session-*")]:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            (source.work / session).mkdir(parents=True)
    with _writing(sources[0].data.shards):
        _remove_outdated(sources, [source.name for source in sources if source.is_done], session)
    return session


def _appears(place: Path) -> bool:
    """Whether a folder that another rank made can be seen here; a network may take a while to show it."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not place.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return place.exists()


def _tokenize(
    source: _Source, session: str, marks: Marks | None, workers: int, progress: Progress, ranks: Ranks
) -> int:
    """Have the pieces of a source done and its manifest written, here or by another rank. Returns how many died."""
    total, done, died = _total_bytes(source.config, source.files), 0, 0

    def tell(text_bytes: int) -> None:
        nonlocal done
        done += text_bytes
        progress(done, total)

    with _writing(source.folder):
        task = source.task(session, marks) if source.is_text else None
        claims = Claims(source.work / session)
        while not (source.folder / MANIFEST).exists():
            try:
                died += work_on(task, workers, tell, ranks.look) if task is not None else 0
                claim = claims.take("finish")
            except FileNotFoundError:  # another rank has finished, and removed the folder of the claims
                if not _appears(source.folder / MANIFEST):
                    raise
                break
            if claim is not None:
                with beating(claim):
                    manifest = _indexed(source, progress) if task is None else _finish(source, task)
                    with whole_file(source.folder / MANIFEST, contested=True) as file:
                        file.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
                _remove_work(source.folder)
            else:
                ranks.look()
                time.sleep(0.1)
    return died


def _indexed(source: _Source, progress: Progress) -> Manifest:
    """The manifest of token files that others wrote, which stay where they are."""
    return foreign.manifest_of(
        source.config, source.token_files, source.data, source.tokenizer, source.folder, progress
    )


def _finish(source: _Source, task: Task) -> Manifest:
    """The manifest of the pieces, after those are redone that only all of them together tell about."""
    records = _cut(task)
    report = joined(task, records, source.listed)
    if not report.documents:
        raise no_usable_document(source.config, report)
    limit = held_out_below(
        [record.lowest_hash for record in records if record.lowest_hash is not None],
        report.documents,
        source.data.validation_fraction,
    )
    for number, record in enumerate(records):
        lowest, differs = record.lowest_hash, record.held_out_below != limit
        if differs and lowest is not None and lowest < max(limit, record.held_out_below):
            records[number] = _again(task, number, limit, record.max_bytes)
    manifest = Manifest(
        made_from=source.made_from,
        tokenizer=source.tokenizer.fingerprint,
        vocab_size=source.tokenizer.vocab_size,
        dtype=token_dtype(source.tokenizer.vocab_size),
        bos_id=source.tokenizer.bos_id,
        eos_id=source.tokenizer.eos_id,
        train=tuple(record.train for record in records if record.train is not None),
        validation=tuple(record.validation for record in records if record.validation is not None),
        skipped=report.skipped,
        examples=report.examples,
    )
    _remove_shards(source.folder, keep={shard.name for shard in manifest.train + manifest.validation})
    return manifest


def _cut(task: Task) -> list[Record]:
    """The records of the pieces up to `max_bytes` of text, of which the last is written again if it goes on beyond."""
    most, records, text_bytes = task.source.max_bytes, list[Record](), 0
    for number in range(len(task.pieces)):
        if most is not None and text_bytes >= most:
            break
        record = read_record(task, number)
        if record is None:
            raise MoeLmError(f"{task.folder}: what was done of piece {number} is gone; run prepare again")
        rest = None if most is None else most - text_bytes
        if rest is not None and record.text_bytes >= rest and record.max_bytes != rest:
            record = _again(task, number, record.held_out_below, rest)
        records.append(record)
        text_bytes += record.text_bytes
    return records


def _again(task: Task, number: int, held_out_below: int, max_bytes: int | None) -> Record:
    # One that stalled until its piece was taken over may still write that as it was: then the names are others here.
    name = number + AGAIN if Claims(task.claims).was_taken_over(f"{number:05d}") else number
    record = write_piece(task, number, held_out_below=held_out_below, max_bytes=max_bytes, name=name)
    assert record is not None
    return record


def _marks(
    sources: Sequence[_Source], done: Collection[str], session: str, workers: int, ranks: Ranks
) -> dict[str, Marks]:
    """The duplicates of each source of text up to the last that is not done, whose folder holds the work."""
    jobs, last = _hashings(sources, done, session)
    if last is None:
        return {}
    with _writing(last.folder):
        try:
            place, claims = last.work / DUPLICATES, last.work / session / "marks"
            marks = duplicates.mark(list(jobs.values()), place, claims, workers, lambda done: None, ranks)
        except FileNotFoundError:  # the other ranks have finished all of it
            if not _appears(last.folder / MANIFEST):
                raise
            return {}
    return dict(zip(jobs, marks, strict=True))


def _hashings(
    sources: Sequence[_Source], done: Collection[str], session: str
) -> tuple[dict[str, Hashing], _Source | None]:
    """The jobs that hash the documents of the sources by name, and the last source that is not done."""
    texts = [source for source in sources if source.is_text]
    missing = [number for number, source in enumerate(texts) if source.name not in done]
    if not missing:
        return {}, None
    last = texts[missing[-1]]
    jobs = {
        source.name: Hashing(
            source.config,
            source.pieces,
            last.work / DUPLICATES / source.name,
            last.work / session / f"hash-{source.name}",
        )
        for source in texts[: missing[-1] + 1]
    }
    return jobs, last


def _remove_outdated(sources: Sequence[_Source], done: Collection[str], session: str) -> None:
    """Remove what was done from files that are others now, so that nobody else has to look at them again."""
    jobs, last = _hashings(sources, done, session) if sources[0].data.drop_duplicates else ({}, None)
    changed = any(not job.is_still_right(number) for job in jobs.values() for number in range(len(job)))
    if changed and last is not None:  # what is a duplicate, then, is open again for all sources
        shutil.rmtree(last.work / DUPLICATES)
    for source in sources:
        if source.is_text and source.name not in done:
            task = source.task(session, None)
            for number in range(len(task)):
                if task.is_done(number) and (changed or read_record(task, number) is None):
                    task.record_path(number).unlink()
    if last is not None:
        (last.work / DUPLICATES).mkdir(exist_ok=True)


def _looked_at(before: Sequence[_Source]) -> str:
    """What a source loses duplicates of, in a sentence that changes when that does."""
    if not before:
        return "within it"
    digest = hashlib.sha256(json.dumps([of.made_from for of in before], sort_keys=True).encode()).hexdigest()
    return f"within it and of {', '.join(of.name for of in before)} ({digest[:16]})"


def _made_from(of: _Source) -> dict[str, Any]:
    """Everything that the shards depend on. Files count by name and size, so that a corpus that grew is noticed."""
    source, files = of.config, of.files
    lines = (f"{name} {size}" for (name, _), size in zip(files, _sizes(files), strict=True))
    listing = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    origin: dict[str, Any] = (
        {"dataset": source.dataset, "subset": source.subset, "split": source.split}
        if source.dataset is not None
        else {"files": f"{len(files)} with names and sizes of sha256 {listing[:16]}"}
    )
    if source.is_set("piece_bytes"):
        origin |= {"piece_bytes": source.piece_bytes}
    return origin | {
        "text_field": source.text_field,
        "max_bytes": source.max_bytes,
        "validation_fraction": of.data.validation_fraction,
        "tokenizer": of.tokenizer.fingerprint,
    }


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    differing = [key for key in before.keys() | now.keys() if before.get(key) != now.get(key)]
    if differing:
        changes = "; ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in sorted(differing))
        raise UsageError(f"{folder} was prepared from something else: {changes}; delete it or set another data.shards")


def _total_bytes(source: SourceConfig, files: Sequence[tuple[str, Path]]) -> int | None:
    if not files or any(path.suffix.lower() not in TEXT_SUFFIXES for _, path in files):
        return None
    total = sum(_sizes(files))
    return total if source.max_bytes is None else min(total, source.max_bytes)


def _sizes(files: Sequence[tuple[str, Path]]) -> list[int]:
    return storage.sizes([path for _, path in files])


def _text_files(source: SourceConfig) -> int:
    """The files of a source of text alone, of which long ones are cut into pieces."""
    files = source_files(source) if source.path is not None else []
    return 0 if any(kind_of(path) in ROW_SUFFIXES for _, path in files) else len(files)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds the folder against a second `prepare`. The lock ends with this process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = try_lock(folder / ".lock")
    if lock is None:
        raise UsageError(f"another process is preparing {folder}; wait for it, or stop it")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MoeLmError(
            f"cannot write shards to {folder}: {error.strerror or error}; fix that and run prepare again, "
            f"it goes on where it stopped"
        ) from error


def _remove_work(folder: Path, keep: Path | None = None) -> None:
    for leftover in folder.glob(".work-*"):
        if leftover != keep:
            shutil.rmtree(leftover, ignore_errors=True)


def _remove_shards(folder: Path, keep: Collection[str]) -> None:
    for pattern in ("train-*.*", "validation-*.*"):
        for leftover in folder.glob(pattern):
            if leftover.name.partition(".")[0] not in keep or leftover.suffix == UNFINISHED:
                leftover.unlink()
