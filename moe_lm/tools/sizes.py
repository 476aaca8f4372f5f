"""Sizes for a text: of the vocabulary, the model and the batch, and of the pieces of which some are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moe_lm.common import storage
from moe_lm.common.errors import UsageError
from moe_lm.config.data import SourceConfig
from moe_lm.text.files import COMPRESSED_SUFFIXES, Report
from moe_lm.text.sources import read_documents, source_files
from moe_lm.text.split import document_hash, held_out_of

HELD_OUT = 0.05  # of the text
PIECES = 64  # that a text is cut into at least, so that a twentieth of it can be held out
SMALLEST_PIECE, LARGEST_PIECE = 2 << 10, 64 << 10  # bytes
TINIEST_PIECE = 256  # bytes, where larger ones are too few
COUNTED = 16e6  # bytes of a text whose pieces are counted
EPOCHS = 16  # after which a text teaches next to nothing more (arXiv 2305.16264)
COMPRESSED = 3  # bytes of text in a byte of a compressed file, about


class Shape(NamedTuple):
    """A model for texts of up to `text_bytes`, with the ids of its tokenizer and the rows of its batch."""

    text_bytes: float
    vocab_size: int
    rows: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int


SHAPES = (  # from 0.9 to 10 million parameters; what a few minutes on two cores can train
    Shape(300e3, 512, 8, 128, 3, 4, 256, 128, 4),
    Shape(1.2e6, 1024, 8, 192, 4, 6, 384, 128, 8),
    Shape(4e6, 2048, 16, 256, 4, 4, 512, 192, 8),
    Shape(float("inf"), 4096, 16, 256, 4, 4, 512, 256, 8),
)


@dataclass(frozen=True)
class Sizes:
    """What a text of `text_bytes` calls for."""

    text_bytes: int
    shape: Shape

    @classmethod
    def of(cls, source: SourceConfig) -> Sizes:
        """The sizes for a source of local files, cut to its `max_bytes`. Raises UsageError if there is no file."""
        size = text_bytes(source)
        return cls(size, next(shape for shape in SHAPES if size <= shape.text_bytes))

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab_size

    @property
    def model(self) -> dict[str, Any]:
        """Settings of the model, without its vocabulary."""
        shape = self.shape._asdict()
        del shape["text_bytes"], shape["vocab_size"], shape["rows"]
        return {**shape, "num_experts_per_tok": 2, "n_shared_experts": 1}

    @property
    def piece_bytes(self) -> int:
        """Bytes of a piece: small enough that HELD_OUT of the text can be held out, large enough to be read as text."""
        return max(SMALLEST_PIECE, min(LARGEST_PIECE, self.text_bytes // PIECES))


def piece_bytes(source: SourceConfig) -> int:
    """Bytes of a piece with which at most twice HELD_OUT of a text is held out, or as little as can be.

    A text without blank lines has fewer pieces than its size says, so those of a small text are counted. Raises
    UsageError for a text of which nothing can be held out.
    """
    sizes = Sizes.of(source)
    if sizes.text_bytes > COUNTED:
        return sizes.piece_bytes
    shares: dict[int, float] = {}
    size = sizes.piece_bytes
    while size >= TINIEST_PIECE:
        shares[size] = held_out_share(source.model_copy(update={"piece_bytes": size}))
        if 0 < shares[size] <= 2 * HELD_OUT:
            return size
        size //= 2
    if not any(shares.values()):
        raise UsageError(
            f"{source.path} is too short to be trained on: its {sizes.text_bytes:,} bytes are one piece, and at least "
            "one of two is held out, to measure what the model learns; give a longer text, or one of more lines"
        )
    return min((size for size in shares if shares[size]), key=shares.__getitem__)


def held_out_share(source: SourceConfig) -> float:
    """The share of a text that is held out, given the bytes of its pieces."""
    documents = [(document_hash(each.id), len(each.text)) for each in read_documents(source, Report())]
    hashes, lengths = (np.array(values, dtype=np.uint64) for values in zip(*documents, strict=True))
    return float(lengths[held_out_of(hashes, HELD_OUT)].sum() / lengths.sum())


def text_bytes(source: SourceConfig) -> int:
    """The bytes of text in a source's files, of compressed ones about."""
    paths = [path for _, path in source_files(source)]
    size = sum(
        bytes_there * (COMPRESSED if path.suffix.lower() in COMPRESSED_SUFFIXES else 1)
        for path, bytes_there in zip(paths, storage.sizes(paths), strict=True)
    )
    return size if source.max_bytes is None else min(size, source.max_bytes)
