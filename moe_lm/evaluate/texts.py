"""The texts that a model is scored on: those that its run held out, source by source, or files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import UsageError
from moe_lm.config.data import SourceConfig
from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig
from moe_lm.data.batches import are_data_of
from moe_lm.data.shards import TokenShards, is_prepared, read_manifest
from moe_lm.text.files import UNREADABLE, Report, kind_of, open_decompressed
from moe_lm.text.sources import ROW_SUFFIXES, read_documents
from moe_lm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Scorable:
    """A text: its documents as token ids, how many they are, and its tokens but for each document's first.

    text_bytes: of these tokens; None where they are not whole characters.
    """

    name: str
    documents: Iterable[ArrayLike]
    count: int
    tokens: int
    text_bytes: int | None


def held_out_texts(run: Path, config: RunConfig | None, tokenizer: Tokenizer) -> list[Scorable]:
    """The held-out text of every source that has some, where `config` leads from where the run is now.

    Raises UsageError if there is none, or it is not that of the run.
    """
    if config is None:
        raise UsageError(f"{run} was not trained here and has no held-out text of its own; give text files to score")
    if isinstance(config, FinetuneConfig):
        raise UsageError(
            f"{run} was fine-tuned on conversations and has no held-out text of its own; give text files to score, "
            f"or the run it started from, {config.start_from}"
        )
    texts = []
    folder = shards_of(checkpoint.resolve(run), config)
    for source in config.data.sources:
        shards = TokenShards.open(folder / source.name, "validation", tokenizer=tokenizer)
        if shards.num_tokens:
            texts.append(_source_text(source.name, shards, tokenizer))
    if not texts:
        raise UsageError(
            f"the shards in {folder} have no held-out text (validation_fraction="
            f"{config.data.validation_fraction}); give text files to score"
        )
    return texts


def shards_of(folder: Path, config: PretrainConfig) -> Path:
    """Where the shards are that a checkpoint was trained on: where its paths lead from its place now, or as written.

    Raises UsageError if other data is there.
    """
    if "data.sha256" not in checkpoint.entries(folder):
        return config.data.shards
    known = checkpoint.read_text(folder, "data.sha256")
    written = Path(checkpoint.read_section(folder, "config.yaml")["data"]["shards"])
    names = [source.name for source in config.data.sources]
    places = [
        place
        for place in dict.fromkeys([config.data.shards, written])
        if all(is_prepared(place / name) for name in names)
    ]
    for place in places:
        if are_data_of(known, (read_manifest(place / name).fingerprint("train") for name in names)):
            return place
    if not places or config.data.on_damage == "leave_out":  # then it is not known which shards were left out
        return config.data.shards
    raise UsageError(
        f"the shards in {' and '.join(map(str, places))} are other data than {folder} was trained on; bring its own "
        "back, or give text files to score"
    )


def _source_text(name: str, shards: TokenShards, tokenizer: Tokenizer) -> Scorable:
    count = shards.num_documents
    if count is None:
        count = sum(1 for _ in shards.documents())
    text_bytes = shards.text_bytes
    if text_bytes is None:  # another program's tokens, of which the first of a document is not predicted
        text_bytes = bytes_of((ids[1:] for ids in shards.documents()), tokenizer)
    return Scorable(name, shards.documents(), count, shards.num_tokens - count, text_bytes)


def bytes_of(documents: Iterable[NDArray[Any]], tokenizer: Tokenizer) -> int | None:
    """The bytes of UTF-8 text that tokens stand for; None where some are parts of characters that are not there."""
    total = 0
    for ids in documents:
        text = tokenizer.decode(ids.tolist())
        if "\ufffd" in text:
            return None
        total += len(text.encode())
    return total or None


def file_texts(files: Sequence[Path], tokenizer: Tokenizer) -> list[Scorable]:
    """The text of every file. Raises UsageError for one that cannot be read, with its place."""
    return [_file_text(file, tokenizer) for file in files]


def _file_text(file: Path, tokenizer: Tokenizer) -> Scorable:
    texts = _read(file)
    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], np.int32) for text in texts]
    tokens = sum(len(ids) - 1 for ids in documents)
    return Scorable(str(file), documents, len(texts), tokens, sum(len(text.encode()) for text in texts))


def _read(file: Path) -> list[str]:
    """The documents of a file."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}; give text files to score")
    if kind_of(file) in ROW_SUFFIXES:
        report = Report()
        texts = [document.text for document in read_documents(SourceConfig(name="file", path=str(file)), report)]
        if report.skipped:
            raise UsageError(f"{file} has rows that cannot be scored: {'; '.join(report.skipped_lines())}")
        return texts
    try:
        with open_decompressed(file) as opened:
            text = opened.read().decode("utf-8")
    except UNREADABLE as error:
        raise UsageError(f"cannot read {file}: {error}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}; convert it first") from error
    if not text:
        raise UsageError(f"{file} is empty; there is nothing to score")
    return [text]
