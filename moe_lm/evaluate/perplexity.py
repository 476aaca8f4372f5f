"""Perplexity and bits per byte, and what compressors without a neural network reach on the same text.

A document is scored as training packs it: `<|bos|>` is given, every token of the text and `<|eos|>` are predicted.
Bits per byte divides by the bytes of the text alone, so that the end of a document is paid for and tokenizers can be
compared.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import ArrayLike, NDArray

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.data import SourceConfig
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig
from moe_lm.data.batches import IGNORE, Batch, pack
from moe_lm.data.shards import TokenShards
from moe_lm.generate.session import Session
from moe_lm.kernels.device import pick_dtype
from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel
from moe_lm.text.files import UNREADABLE, Report, kind_of, open_decompressed
from moe_lm.text.sources import ROW_SUFFIXES, read_documents
from moe_lm.tokenizer.tokenizer import Tokenizer

BATCH_ROWS = 8  # windows at once
WINDOW = 2048  # tokens, where no training says how long its rows were
LOGIT_ROWS = 4096  # positions whose logits are in memory at once


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    text: str  # what was scored, in words
    documents: int
    text_bytes: int
    tokens: int  # predicted, each document's end included
    nll: float  # nats a token

    @property
    def perplexity(self) -> float:
        """A token's; the model hesitates as if between this many equally likely ones."""
        return math.exp(min(self.nll, 700.0))  # beyond, floats end

    @property
    def bits_per_byte(self) -> float:
        return self.nll * self.tokens / math.log(2) / self.text_bytes

    def __str__(self) -> str:
        return (
            f"{self.text}: {self.documents:,} documents, {self.text_bytes:,} bytes, {self.tokens:,} tokens\n"
            f"loss {self.nll:.4f} nats a token, perplexity {self.perplexity:.3f}, {self.bits_per_byte:.4f} bits a byte"
        )


@dataclass(frozen=True)
class Scorable:
    """Documents as token ids from bos to eos, their number, and the bytes of their texts."""

    documents: Iterable[ArrayLike]
    count: int
    text_bytes: int


def evaluate(run: Path, files: Sequence[Path] = (), stride: int | None = None, base: Path | None = None) -> Evaluation:
    """Score files (text, JSON rows or Parquet, compressed or not), or else the run's own held-out text.

    A text file is one document. Documents longer than the training's sequence length (WINDOW for a model that was not
    trained here) are scored in windows of that length; each window but the first scores `stride` new tokens, by default
    half of it. A smaller one gives every token more context and takes longer. Products run in the precision of the
    training. `base` is where the base of adapters is when it has moved.
    Raises UsageError for a run, file or stride that cannot be used.
    """
    session = Session.load(run, base=base)
    config = _run_config(session.checkpoint)
    text = _file_documents(files, session.tokenizer) if files else _held_out_documents(run, config, session.tokenizer)
    window = min(config.data.sequence_length if config else WINDOW, session.model.config.max_position_embeddings)
    precision = config.train.precision if config else "auto"
    dtype = pick_dtype(precision, session.model.device)
    nll_sum, tokens = score_documents(session.model, text.documents, window, stride, dtype=dtype)
    if not math.isfinite(nll_sum):
        raise MoeLmError(
            f"the loss of {session.checkpoint} is {nll_sum}; its weights are damaged or its training diverged, "
            "evaluate an earlier checkpoint"
        )
    name = ", ".join(map(str, files)) if files else f"held-out text of {run}"
    return Evaluation(name, text.count, text.text_bytes, tokens, nll_sum / tokens)


def score_documents(
    model: LanguageModel,
    documents: Iterable[ArrayLike],
    window: int,
    stride: int | None = None,
    batch_rows: int = BATCH_ROWS,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, int]:
    """Negative log-likelihood in nats, and number, of all tokens but each document's first.

    Every token is predicted once, from the up to `window` tokens before it: the first window of a document scores all
    it holds, every other one the next `stride` tokens (half a window when None). `batch_rows` windows are computed at
    once; with a `dtype` other than float32 under autocast. Raises UsageError for an impossible stride.
    """
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"stride={stride} does not fit windows of {window} tokens; give 1 to {window}")
    device = model.device
    every_window = chain.from_iterable(_windows(np.asarray(ids, np.int64), window, stride) for ids in documents)
    nll_sum = torch.zeros((), dtype=torch.float64)
    tokens = 0
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in _batches(every_window, batch_rows * window):
            nll_sum += _nll_sum(model, batch.to(device))
            tokens += batch.num_targets
    return float(nll_sum), tokens


def compression_baselines(text: bytes) -> dict[str, float]:
    """Bits per byte of general compressors, under the names of the quickstart's summary."""
    return {"xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text)}


def unigram_bits_per_byte(train_counts: NDArray[Any], tokens: NDArray[Any], text_bytes: int) -> float:
    """Bits per byte when each token is predicted by its frequency alone, with add-one smoothing.

    train_counts: [vocabulary], how often training text has each token; tokens: those predicted. Leave bos, which
    nothing predicts, out of both.
    """
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-np.log2(probabilities)[tokens].sum()) / text_bytes


class _Window(NamedTuple):
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]  # IGNORE where another window scores them


def _windows(ids: NDArray[np.int64], window: int, stride: int) -> Iterator[_Window]:
    begin, end = 1, min(len(ids), 1 + window)  # the tokens to score
    while begin < end:
        start = max(0, end - 1 - window)
        targets = ids[start + 1 : end].copy()
        targets[: begin - start - 1] = IGNORE
        yield _Window(ids[start : end - 1], targets)
        begin, end = end, min(len(ids), end + stride)


def _batches(windows: Iterable[_Window], max_tokens: int) -> Iterator[Batch]:
    """Windows one after the other in a single row, each a segment of its own: nothing is padded."""
    group: list[_Window] = []
    size = 0
    for window in windows:
        if size + len(window.input_ids) > max_tokens:
            yield _packed(group)
            group, size = [], 0
        group.append(window)
        size += len(window.input_ids)
    if group:
        yield _packed(group)


def _packed(group: Sequence[_Window]) -> Batch:
    bounds = np.cumsum([0, *(len(window.input_ids) for window in group)])
    input_ids, targets = (np.concatenate(arrays)[None] for arrays in zip(*group, strict=True))
    return pack(input_ids, targets, bounds)


def _nll_sum(model: LanguageModel, batch: Batch) -> torch.Tensor:
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
    hidden_1TD, _ = model.model(batch.input_ids, batch.position_ids, attend)
    scored = batch.targets != IGNORE
    pieces = zip(hidden_1TD[scored].split(LOGIT_ROWS), batch.targets[scored].split(LOGIT_ROWS), strict=True)
    losses = [F.cross_entropy(model.lm_head(hidden).float(), targets, reduction="sum") for hidden, targets in pieces]
    return torch.stack(losses).cpu().double().sum()


def _run_config(folder: Path) -> RunConfig | None:
    """None for a model that was imported or upcycled, not trained here."""
    if not checkpoint.verify(folder, "config.yaml"):
        return None
    values = yaml.safe_load(checkpoint.read_text(folder, "config.yaml"))
    origin = str(folder / "config.yaml")
    if "start_from" in values:
        return build_config(FinetuneConfig, values, origin, saved=True)
    return build_config(PretrainConfig, values, origin, saved=True)


def _held_out_documents(run: Path, config: RunConfig | None, tokenizer: Tokenizer) -> Scorable:
    if config is None:
        raise UsageError(f"{run} was not trained here and has no held-out text of its own; give text files to score")
    if isinstance(config, FinetuneConfig):
        raise UsageError(
            f"{run} was fine-tuned on conversations and has no held-out text of its own; give text files to score, "
            f"or the run it started from, {config.start_from}"
        )
    folders = [config.data.shards / source.name for source in config.data.sources]
    shards = [TokenShards.open(folder, "validation", tokenizer=tokenizer) for folder in folders]
    count = sum(item.num_documents for item in shards)
    if not count:
        raise UsageError(
            f"the shards in {config.data.shards} hold no text out (validation_fraction="
            f"{config.data.validation_fraction}); give text files to score"
        )
    documents = (
        item.tokens(start, stop)
        for item in shards
        for start, stop in zip(item.document_starts, [*item.document_starts[1:], item.num_tokens], strict=True)
    )
    return Scorable(documents, count, sum(item.text_bytes for item in shards))


def _file_documents(files: Sequence[Path], tokenizer: Tokenizer) -> Scorable:
    texts = [text for file in files for text in _file_texts(file)]
    documents = ([tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts)
    return Scorable(documents, len(texts), sum(len(text.encode()) for text in texts))


def _file_texts(file: Path) -> list[str]:
    """The texts of a file; nothing is left out quietly, what cannot be read raises UsageError with its place."""
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
