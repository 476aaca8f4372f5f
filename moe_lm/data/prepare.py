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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import UNFINISHED, try_lock, whole_file
from moe_lm.common.process import cores
from moe_lm.config.data import DataConfig, SourceConfig
from moe_lm.data import foreign
from moe_lm.data.chunks import Record, Task, joined, read_record, write_piece
from moe_lm.data.crew import Ranks, beating, claimed_to_finish, finish_claim, work_on
from moe_lm.data.shards import MANIFEST, Manifest, read_manifest, token_dtype
from moe_lm.text.files import kind_of
from moe_lm.text.pieces import divide
from moe_lm.text.sources import ROW_SUFFIXES, TEXT_SUFFIXES, Report, no_usable_document, source_files
from moe_lm.text.split import hashes_below, held_out_below
from moe_lm.tokenizer.tokenizer import Tokenizer

WORK_FORMAT = 2  # of records and pieces: other work is not gone on with
SECONDS_TO_APPEAR = 10.0  # for a folder on the network
MOST_HELD_OUT = 0.1  # of a source, without a word

Progress = Callable[[int, int | None], None]  # bytes of a source's text that are done, and all of them if known


@dataclass(frozen=True)
class PrepareReport:
    """The manifest of each source by name. As text: documents, bytes, tokens, and counts of what was skipped.

    `files` are those of sources of text, whose documents are whole files or pieces of them.
    """

    manifests: dict[str, Manifest]
    files: dict[str, int]
    validation_fraction: float
    up_to_date: frozenset[str] = field(default=frozenset(), compare=False)  # sources whose shards were there
    died: int = field(default=0, compare=False)  # processes, whose pieces others did

    def __str__(self) -> str:
        lines = [line for name in self.manifests for line in self._lines(name)]
        if self.died:
            lines.append(
                f"{self.died} of the processes were killed, perhaps because memory ran out; others did their part"
            )
        return "\n".join(lines)

    def _lines(self, name: str) -> Iterator[str]:
        manifest, files = self.manifests[name], self.files[name]
        if manifest.notes:
            yield from _lines_in_place(name, manifest, name in self.up_to_date)
            return
        count, text_bytes = manifest.documents or 0, manifest.text_bytes or 0
        whole = f"{files} file{'s' * (files != 1)} in " if 0 < files < count else ""
        unit = "pieces" if whole else "documents"
        yield (
            f"{name}: {whole}{_counted(count, unit)}, {text_bytes:,} bytes, {manifest.tokens:,} tokens "
            f"({text_bytes / manifest.tokens:.2f} bytes per token)"
            + (", up to date" if name in self.up_to_date else "")
        )
        documents, tokens = (sum(getattr(shard, of) for shard in manifest.validation) for of in ("documents", "tokens"))
        share = tokens / manifest.tokens
        yield f"  held out: {_counted(documents, unit)}, {tokens:,} tokens ({share:.1%})"
        if share > MOST_HELD_OUT and share > 2 * self.validation_fraction:
            yield (
                f"  warning: {share:.0%} of the text is held out, as it has only {count} {unit}, of which "
                f"data.validation_fraction={self.validation_fraction} holds out at least one; "
                + ("set a lower piece_bytes of the source" if whole else "divide it into more, or hold out none")
            )
        report = Report(skipped=manifest.skipped, examples=manifest.examples)
        yield from (f"  {line}" for line in report.skipped_lines())


def _counted(count: int, units: str) -> str:
    return f"{count:,} {units if count != 1 else units.removesuffix('s')}"


def _lines_in_place(name: str, manifest: Manifest, up_to_date: bool) -> Iterator[str]:
    held_out = sum(shard.tokens for shard in manifest.validation)
    yield (
        f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {held_out:,} of them held out "
        f"({held_out / manifest.tokens:.1%})" + (", up to date" if up_to_date else "")
    )
    yield from (f"  {note}" for note in manifest.notes)


def prepare(config: DataConfig, progress: Progress | None = None, ranks: Ranks | None = None) -> PrepareReport:
    """Write the shards of every source that has none yet, together with the other `ranks`.

    Raises UsageError for a source that is missing or empty, for shards made from something else and for a folder that
    the ranks do not share, MoeLmError when the shards cannot be written.
    """
    if storage.is_remote(config.shards):
        url = storage.text_of(config.shards)
        raise UsageError(
            f"data.shards={url} is in a store, and shards are written to a disk; prepare with data.shards=shards, then "
            f"copy that folder there, as with: aws s3 sync shards {url}"
        )
    ranks = ranks or Ranks()
    tokenizer = Tokenizer.load(config.tokenizer)
    sources = [_Source(config, source, tokenizer) for source in config.sources]
    with ExitStack() as stack:
        session = _begin(sources, stack) if ranks.rank == 0 else ""
        session, were_there = json.loads(ranks.first(json.dumps([session, [s.name for s in sources if s.is_done]])))
        places = [source.work / session for source in sources if source.name not in were_there]
        ranks.check_same({str(place): "there" if _appears(place) else "not there" for place in places})
        workers = max(1, (config.workers or cores()) // (1 if config.workers else ranks.on_this_host))
        manifests, died = dict[str, Manifest](), 0
        for source in sources:
            if source.name not in were_there:
                died += _tokenize(source, session, workers, progress or (lambda done, total: None))
            manifests[source.name] = read_manifest(source.folder)
    files = {source.name: _text_files(source.config) for source in sources}
    return PrepareReport(manifests, files, config.validation_fraction, frozenset(were_there), died)


class _Source:
    """A source with its files, its folder of shards and the folder of its records."""

    def __init__(self, data: DataConfig, config: SourceConfig, tokenizer: Tokenizer) -> None:
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
        key = json.dumps([WORK_FORMAT, self.made_from], sort_keys=True)
        self.work = self.folder / f".work-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        self.is_done = (self.folder / MANIFEST).exists()

    def task(self, session: str) -> Task:
        pieces = divide(self.config, self.files)
        limit = hashes_below(self.data.validation_fraction)
        fingerprint = self.tokenizer.fingerprint
        return Task(
            self.config, pieces, self.data.tokenizer, fingerprint, self.folder, self.work, self.work / session, limit
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
    return session


def _appears(place: Path) -> bool:
    """Whether a folder that another rank made can be seen here; a network may take a while to show it."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not place.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return place.exists()


def _tokenize(source: _Source, session: str, workers: int, progress: Progress) -> int:
    """Have the pieces of a source done and its manifest written, here or by another rank. Returns how many died."""
    total, done, died = _total_bytes(source.config, source.files), 0, 0

    def tell(text_bytes: int) -> None:
        nonlocal done
        done += text_bytes
        progress(done, total)

    with _writing(source.folder):
        task = source.task(session) if source.config.tokens is None else None
        while not (source.folder / MANIFEST).exists():
            try:
                died += work_on(task, workers, tell) if task is not None else 0
                is_mine = claimed_to_finish(source.work / session)
            except FileNotFoundError:  # another rank has finished, and removed the folder of the claims
                if not (source.folder / MANIFEST).exists():
                    raise
                break
            if is_mine:
                with beating(finish_claim(source.work / session)):
                    manifest = _indexed(source, progress) if task is None else _finish(source, task)
                    with whole_file(source.folder / MANIFEST, contested=True) as file:
                        file.write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
                _remove_work(source.folder)
            else:
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
            records[number] = write_piece(task, number, held_out_below=limit, max_bytes=record.max_bytes)
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
            record = write_piece(task, number, held_out_below=record.held_out_below, max_bytes=rest)
        records.append(record)
        text_bytes += record.text_bytes
    return records


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
    for pattern in ("train-?????.*", "validation-?????.*"):
        for leftover in folder.glob(pattern):
            if leftover.name.partition(".")[0] not in keep or leftover.suffix == UNFINISHED:
                leftover.unlink()
