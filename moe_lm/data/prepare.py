"""Documents -> token shards, tokenized by several processes; a run that was killed goes on where it stopped.

The documents of a source become chunks (chunks.py). Finished chunks are joined in order into shards, and the manifest,
written last, makes the folder complete. The bytes of the shards depend neither on the number of processes nor on
interruptions.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_lm.common import storage
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.files import UNFINISHED, try_lock, whole_file
from moe_lm.common.integrity import KINDS, XXH3
from moe_lm.config.data import DataConfig, SourceConfig, TokenFiles
from moe_lm.data import foreign
from moe_lm.data.chunks import Workers, write_chunks
from moe_lm.data.shards import MANIFEST, Manifest, Shard, Split, read_manifest, token_dtype
from moe_lm.text.files import kind_of
from moe_lm.text.sources import ROW_SUFFIXES, TEXT_SUFFIXES, Report, read_documents, source_files
from moe_lm.text.split import held_out_of
from moe_lm.tokenizer.tokenizer import Tokenizer

SHARD_TOKENS = 64 << 20
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

    def __str__(self) -> str:
        return "\n".join(line for name in self.manifests for line in self._lines(name))

    def _lines(self, name: str) -> Iterator[str]:
        manifest, files = self.manifests[name], self.files[name]
        if manifest.notes:
            yield from _lines_in_place(name, manifest, name in self.up_to_date)
            return
        count, text_bytes = manifest.documents or 0, manifest.text_bytes or 0
        whole = f"{files} file{'s' * (files != 1)} in " if 0 < files < count else ""
        unit = "pieces" if whole else "documents"
        yield (
            f"{name}: {whole}{count:,} {unit}, {text_bytes:,} bytes, {manifest.tokens:,} tokens "
            f"({text_bytes / manifest.tokens:.2f} bytes per token)"
            + (", up to date" if name in self.up_to_date else "")
        )
        documents, tokens = (sum(getattr(shard, of) for shard in manifest.validation) for of in ("documents", "tokens"))
        share = tokens / manifest.tokens
        yield f"  held out: {documents:,} {unit}, {tokens:,} tokens ({share:.1%})"
        if share > MOST_HELD_OUT and share > 2 * self.validation_fraction:
            yield (
                f"  warning: {share:.0%} of the text is held out, as it has only {count} {unit}, of which "
                f"data.validation_fraction={self.validation_fraction} holds out at least one; "
                + ("set a lower piece_bytes of the source" if whole else "divide it into more, or hold out none")
            )
        report = Report(skipped=manifest.skipped, examples=manifest.examples)
        yield from (f"  {line}" for line in report.skipped_lines())


def _lines_in_place(name: str, manifest: Manifest, up_to_date: bool) -> Iterator[str]:
    held_out = sum(shard.tokens for shard in manifest.validation)
    yield (
        f"{name}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, {held_out:,} of them held out "
        f"({held_out / manifest.tokens:.1%})" + (", up to date" if up_to_date else "")
    )
    yield from (f"  {note}" for note in manifest.notes)


def prepare(config: DataConfig, progress: Progress | None = None) -> PrepareReport:
    """Write the shards of every source that has none yet.

    Raises UsageError for a source that is missing or empty and for shards made from something else, MoeLmError
    when the shards cannot be written.
    """
    if storage.is_remote(config.shards):
        url = storage.text_of(config.shards)
        raise UsageError(
            f"data.shards={url} is in a store, and shards are written to a disk; prepare with data.shards=shards, then "
            f"copy that folder there, as with: aws s3 sync shards {url}"
        )
    tokenizer = Tokenizer.load(config.tokenizer)
    were_there = frozenset(
        source.name for source in config.sources if (config.shards / source.name / MANIFEST).exists()
    )
    with Workers(config.workers or os.cpu_count() or 1) as workers:
        job = _Job(config, tokenizer, workers, progress or (lambda done, total: None))
        manifests = {source.name: _prepare_source(job, source) for source in config.sources}
    files = {source.name: _text_files(source) for source in config.sources}
    return PrepareReport(manifests, files, config.validation_fraction, were_there)


@dataclass(frozen=True)
class _Job:
    config: DataConfig
    tokenizer: Tokenizer
    workers: Workers
    progress: Progress


def _prepare_source(job: _Job, source: SourceConfig) -> Manifest:
    folder = job.config.shards / source.name
    if source.tokens is not None:
        return _index(job, source, source.tokens, folder)
    files = [] if source.dataset is not None else source_files(source)
    made_from = _made_from(source, files, job)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _check_same(folder, manifest.made_from, made_from)
        _remove_work(folder)
        return manifest
    try:
        with _only_writer(folder):
            work = _work_folder(folder, made_from)
            report = Report()
            chunks = _tokenize(job, source, work, report, _total_bytes(source, files))
            shards = _join(chunks, folder, job.config.validation_fraction)
            manifest = Manifest(
                made_from=made_from,
                tokenizer=job.tokenizer.fingerprint,
                vocab_size=job.tokenizer.vocab_size,
                dtype=token_dtype(job.tokenizer.vocab_size),
                bos_id=job.tokenizer.bos_id,
                eos_id=job.tokenizer.eos_id,
                train=shards["train"],
                validation=shards["validation"],
                skipped=report.skipped,
                examples=report.examples,
            )
            _write(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
            _remove_work(folder)
    except OSError as error:
        raise MoeLmError(
            f"cannot write shards to {folder}: {error.strerror or error}; fix that and run prepare again, "
            f"it goes on where it stopped"
        ) from error
    return manifest


def _index(job: _Job, source: SourceConfig, tokens: TokenFiles, folder: Path) -> Manifest:
    """The manifest of token files that others wrote, which stay where they are."""
    files = foreign.files_of(tokens)
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        fraction = job.config.validation_fraction
        _check_same(folder, manifest.made_from, foreign.made_from(tokens, files, fraction, job.tokenizer))
        return manifest
    try:
        with _only_writer(folder):
            manifest = foreign.manifest_of(source, files, job.config, job.tokenizer, folder, job.progress)
            _write(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
    except OSError as error:
        raise MoeLmError(
            f"cannot write {folder / MANIFEST}: {error.strerror or error}; fix that, or the disk"
        ) from error
    return manifest


def _tokenize(job: _Job, source: SourceConfig, work: Path, report: Report, total_bytes: int | None) -> list[Path]:
    """The chunk files of a source, in order."""
    documents = read_documents(source, report)
    paths, done = [], 0
    for path, text_bytes in write_chunks(documents, job.config.tokenizer, job.tokenizer.fingerprint, work, job.workers):
        paths.append(path)
        done += text_bytes
        job.progress(done, total_bytes)
    return paths


def _made_from(source: SourceConfig, files: Sequence[tuple[str, Path]], job: _Job) -> dict[str, Any]:
    """Everything that the shards depend on. Files count by name and size, so that a corpus that grew is noticed."""
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
        "validation_fraction": job.config.validation_fraction,
        "tokenizer": job.tokenizer.fingerprint,
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


def _work_folder(folder: Path, made_from: dict[str, Any]) -> Path:
    """The folder of the chunks. Chunks of an earlier run that were made from something else are removed."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    work = folder / f".work-{key}"
    _remove_work(folder, keep=work)
    work.mkdir(exist_ok=True)
    return work


def _remove_work(folder: Path, keep: Path | None = None) -> None:
    for leftover in folder.glob(".work-*"):
        if leftover != keep:
            shutil.rmtree(leftover, ignore_errors=True)


def _join(chunks: Sequence[Path], folder: Path, validation_fraction: float) -> dict[Split, tuple[Shard, ...]]:
    for pattern in ("train-?????.*", "validation-?????.*", f"*{UNFINISHED}"):
        for leftover in folder.glob(pattern):
            leftover.unlink()
    held_out = held_out_of(np.concatenate([_read(path, "hashes") for path in chunks]), validation_fraction)
    writers: dict[Split, _ShardWriter] = {split: _ShardWriter(folder, split) for split in ("train", "validation")}
    for path in chunks:
        tokens, index = _read(path, "tokens"), _read(path, "index")
        held, held_out = np.split(held_out, [len(index)])
        token_held = np.repeat(held, index[:, 0])
        writers["validation"].add(tokens[token_held], index[held])
        writers["train"].add(tokens[~token_held], index[~held])
    return {split: writer.close() for split, writer in writers.items()}


def _read(chunk: Path, name: str) -> NDArray[Any]:
    with np.load(chunk) as file:
        array: NDArray[Any] = file[name]
        return array


class _ShardWriter:
    """Collects documents and writes a shard whenever there are SHARD_TOKENS tokens."""

    def __init__(self, folder: Path, split: Split) -> None:
        self._folder = folder
        self._split = split
        self._shards: list[Shard] = []
        self._tokens: list[NDArray[Any]] = []
        self._index: list[NDArray[np.int64]] = []
        self._size = 0

    def add(self, tokens: NDArray[Any], index: NDArray[np.int64]) -> None:
        self._tokens.append(tokens)
        self._index.append(index)
        self._size += len(tokens)
        if self._size >= SHARD_TOKENS:
            self._flush()

    def close(self) -> tuple[Shard, ...]:
        if self._size:
            self._flush()
        return tuple(self._shards)

    def _flush(self) -> None:
        name = f"{self._split}-{len(self._shards):05d}"
        tokens, index = np.concatenate(self._tokens), np.concatenate(self._index)
        self._shards.append(
            Shard(
                name=name,
                tokens=len(tokens),
                documents=len(index),
                text_bytes=int(index[:, 1].sum()),
                xxh3_128=_write(self._folder / f"{name}.bin", tokens.data),
                index_xxh3_128=_write(self._folder / f"{name}.index", index.data),
            )
        )
        self._tokens, self._index, self._size = [], [], 0


def _write(path: Path, data: bytes | memoryview) -> str:
    """Write a file that appears whole or not at all. Returns its checksum."""
    with whole_file(path) as file:
        file.write_bytes(data)
    return str(KINDS[XXH3](data).hexdigest())
