"""Perplexity and bits per byte of a model, and of baselines without a neural network.

A document is scored as training packs it: `<|bos|>` is given; every token of the text, and `<|eos|>`, are predicted.
Bits per byte divide the loss of all of them by the bytes of the text, so that tokenizers can be compared.
"""

from __future__ import annotations

import itertools
import lzma
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from moe_lm.checkpoint import checkpoint
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.moved import moved_along
from moe_lm.config.reading import build_config
from moe_lm.config.run import FinetuneConfig, PretrainConfig, RunConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.packing import Example, pack_examples
from moe_lm.evaluate.texts import file_texts, held_out_texts
from moe_lm.generate.session import Session
from moe_lm.kernels.device import pick_dtype
from moe_lm.model.attention import PackedAttention, segment_positions
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import Predictions

BATCH_ROWS = 8  # windows at once
WINDOW = 2048  # tokens, for a model that was not trained here
SHORT = 32  # tokens of context, of which those with fewer are one bucket


@dataclass(frozen=True)
class ContextScore:
    """How well tokens with so many tokens before them in their window are predicted."""

    context: range
    tokens: int
    nll: float  # nats per token

    def __str__(self) -> str:
        context = f"{self.context.start:,} to {self.context.stop - 1:,}"
        return f"{context:>18}  {self.tokens:>12,}  {self.nll:>8.4f}  {_perplexity(self.nll):>10.3f}"


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text."""

    text: str  # a description of it
    documents: int
    text_bytes: int | None  # None: unknown
    tokens: int  # predicted, including the end of each document
    nll: float  # nats per token
    by_context: Sequence[ContextScore] = ()
    parts: Sequence[TextScore] = ()  # its sources or files, if there are several

    @property
    def perplexity(self) -> float:
        return _perplexity(self.nll)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes of the text are unknown."""
        return None if self.text_bytes is None else self.nll * self.tokens / math.log(2) / self.text_bytes

    @property
    def figures(self) -> str:
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        return f"loss {self.nll:.4f} nats per token, perplexity {self.perplexity:.3f}{bits}"

    @property
    def size(self) -> str:
        return "bytes unknown" if self.text_bytes is None else f"{self.text_bytes:,} bytes"

    def __str__(self) -> str:
        """A line for each part, the whole, and a line for each length of context."""
        lines = [f"{part.text}: {part.figures} ({part.size})" for part in self.parts]
        lines.append(f"{self.text}: {self.documents:,} documents, {self.size}, {self.tokens:,} tokens")
        lines.append(self.figures)
        if self.by_context:
            lines.append(f"\n{'tokens of context':>18}  {'tokens':>12}  {'loss':>8}  {'perplexity':>10}")
        return "\n".join([*lines, *map(str, self.by_context)])


def evaluate(
    run: Path,
    files: Sequence[Path] = (),
    stride: int | None = None,
    base: Path | None = None,
    window: int | None = None,
    by_position: bool = False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> TextScore:
    """Score files (text, JSON rows or Parquet, compressed or not) or, without any, the run's held-out text.

    A text file is one document. Windows are by default as long as the training's sequences (WINDOW for a model that was
    not trained here), and the precision is that of training. A smaller `stride` gives every token more context and
    takes longer. `base` is the folder of the adapters' base, if it has moved. With `by_position` windows do not
    overlap, but for a document's last one, and the score also has its parts by the length of the context. Several files
    or sources are parts of the score. `tell` hears how many tokens are scored, and of how many.
    Raises UsageError for a run, file, window or stride that cannot be used.
    """
    session = Session.load(run, base=base, decoding=False)
    config = run_config(session.checkpoint)
    texts = file_texts(files, session.tokenizer) if files else held_out_texts(run, config, session.tokenizer)
    positions = session.model.config.max_position_embeddings
    window = window or min(config.data.sequence_length if config else WINDOW, positions)
    check_window(session.model, "--window", window)
    rows = max(1, min(BATCH_ROWS, BATCH_ROWS * WINDOW // window))
    stride, total = window if by_position else stride, sum(text.tokens for text in texts)
    scores: list[TextScore] = []
    sums = torch.zeros(window + 1, dtype=torch.float64), torch.zeros(window + 1, dtype=torch.int64)
    for text in texts:

        def tell_more(tokens: int) -> None:
            tell(sum(score.tokens for score in scores) + tokens, total)

        nll, counts = score_by_context(
            session.model, text.documents, window, stride, rows, precision_of(session), tell_more
        )
        nll_sum, tokens = float(nll.sum()), int(counts.sum())
        if not math.isfinite(nll_sum):
            raise MoeLmError(
                f"the loss of {session.checkpoint} is {nll_sum}; its weights are damaged or its training diverged, "
                "evaluate an earlier checkpoint"
            )
        scores.append(TextScore(text.name, text.count, text.text_bytes, tokens, nll_sum / tokens))
        sums = sums[0] + nll, sums[1] + counts
    name = ", ".join(map(str, files)) if files else f"held-out text of {run}"
    return together(name, scores, context_scores(*sums) if by_position else ())


def together(name: str, parts: Sequence[TextScore], by_context: Sequence[ContextScore] = ()) -> TextScore:
    """The score of several texts as one."""
    tokens = sum(part.tokens for part in parts)
    sizes = [part.text_bytes for part in parts]
    return TextScore(
        text=name,
        documents=sum(part.documents for part in parts),
        text_bytes=None if None in sizes else sum(size for size in sizes if size is not None),
        tokens=tokens,
        nll=sum(part.nll * part.tokens for part in parts) / tokens,
        by_context=by_context,
        parts=parts if len(parts) > 1 else (),
    )


def score_documents(
    model: LanguageModel,
    documents: Iterable[ArrayLike],
    window: int,
    stride: int | None = None,
    batch_rows: int = BATCH_ROWS,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, int]:
    """Negative log-likelihood in nats, and number, of all tokens but each document's first.

    Every token is predicted once, from at most `window` tokens before it: the first window of a document scores all its
    tokens, every other window the next `stride` tokens (None: half a window). `batch_rows` windows are computed at
    once, under autocast for a `dtype` other than float32. Raises UsageError for an impossible stride.
    """
    nll, tokens = score_by_context(model, documents, window, stride, batch_rows, dtype)
    return float(nll.sum()), int(tokens.sum())


def score_by_context(
    model: LanguageModel,
    documents: Iterable[ArrayLike],
    window: int,
    stride: int | None = None,
    batch_rows: int = BATCH_ROWS,
    dtype: torch.dtype = torch.float32,
    tell: Callable[[int], None] = lambda tokens: None,
) -> tuple[Tensor, Tensor]:
    """What `score_documents` adds up, by the number of tokens before a token in its window: `[window + 1]` each.

    With `stride=window` each token of a document is in one window, but for those that fill its last one. `tell` hears
    how many tokens are scored.
    """
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise UsageError(f"stride={stride} does not fit windows of {window} tokens; give 1 to {window}")
    device = model.device
    every_window = chain.from_iterable(_windows(np.asarray(ids, np.int64), window, stride) for ids in documents)
    nll, tokens = torch.zeros(window + 1, dtype=torch.float64), torch.zeros(window + 1, dtype=torch.int64)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in _batches(every_window, batch_rows * window):
            positions_1T = segment_positions(batch.cu_seqlens, batch.input_ids.shape)
            context = positions_1T[batch.targets != IGNORE] + 1
            nll += torch.bincount(context, _nll(model, batch.to(device)), minlength=window + 1)
            tokens += torch.bincount(context, minlength=window + 1)
            tell(int(tokens.sum()))
    return nll, tokens


def context_scores(nll: Tensor, tokens: Tensor) -> list[ContextScore]:
    """Scores by context in buckets, each twice as long as the one before; the last is the second half of a window."""
    ends = [len(nll) - 1]
    while ends[0] > SHORT:
        ends.insert(0, ends[0] // 2)
    found = []
    for start, stop in itertools.pairwise([0, *ends]):
        count = int(tokens[start + 1 : stop + 1].sum())
        if count:
            mean = float(nll[start + 1 : stop + 1].sum()) / count
            found.append(ContextScore(range(start + 1, stop + 1), count, mean))
    return found


def xz_bits_per_byte(text: bytes) -> float:
    """Bits per byte of a general compressor."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def unigram_bits_per_byte(train_counts: NDArray[Any], tokens: NDArray[Any], text_bytes: int) -> float:
    """Bits per byte of `tokens`, predicted by their frequency only, with add-one smoothing.

    train_counts: [vocabulary], of the training text. Leave bos, which is never predicted, out of both.
    """
    probabilities = (train_counts + 1) / (train_counts.sum() + len(train_counts))
    return float(-np.log2(probabilities)[tokens].sum()) / text_bytes


def _windows(ids: NDArray[np.int64], window: int, stride: int) -> Iterator[Example]:
    begin, end = 1, min(len(ids), 1 + window)  # of the tokens to score
    while begin < end:
        start = max(0, end - 1 - window)
        targets = ids[start + 1 : end].copy()
        targets[: begin - start - 1] = IGNORE
        yield Example(ids[start : end - 1], targets)
        begin, end = end, min(len(ids), end + stride)


def _batches(windows: Iterable[Example], max_tokens: int) -> Iterator[Batch]:
    """Windows packed into a single row, each a segment of its own: nothing is padded."""
    group: list[Example] = []
    size = 0
    for window in windows:
        if size + len(window.input_ids) > max_tokens:
            yield pack_examples([group], size, pad_id=0)[0]
            group, size = [], 0
        group.append(window)
        size += len(window.input_ids)
    if group:
        yield pack_examples([group], size, pad_id=0)[0]


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700.0))  # exp overflows beyond


def _nll(model: LanguageModel, batch: Batch) -> Tensor:
    """The negative log-likelihood of every target, in nats, `[targets]` on the host."""
    attend = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
    positions_1T = segment_positions(batch.cu_seqlens, batch.input_ids.shape)
    hidden_1TD, _ = model.model(batch.input_ids, positions_1T, attend)
    scored = batch.targets != IGNORE
    nll = Predictions(model.lm_head, hidden_1TD[scored]).nll(batch.targets[scored])
    return nll.cpu().double()


def check_window(model: LanguageModel, option: str, window: int) -> None:
    """Raise UsageError for more tokens than the positions that a model has learned one by one."""
    positions = model.config.max_position_embeddings
    if window > positions and model.config.position_embedding == "learned":
        raise UsageError(
            f"{option} {window} is longer than the {positions} positions that the model has learned; shorten it"
        )


def precision_of(session: Session) -> torch.dtype:
    """The data type of matrix products: that of training; of a model from elsewhere, what the device is fast at."""
    config = run_config(session.checkpoint)
    return pick_dtype(config.train.precision if config else "auto", session.model.device)


def run_config(folder: Path) -> RunConfig | None:
    """The config of a run; None for a model that was imported or upcycled."""
    if not checkpoint.verify(folder, "config.yaml"):
        return None
    values = moved_along(checkpoint.read_section(folder, "config.yaml"), folder.parent.parent)
    origin = str(folder / "config.yaml")
    if "model" not in values:  # that of a fine-tuning comes with its start
        return build_config(FinetuneConfig, values, origin)
    return build_config(PretrainConfig, values, origin)
