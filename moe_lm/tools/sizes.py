"""Sizes for a text: of the vocabulary, the model and the batch, and of the pieces of which some are held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from moe_lm.config.data import SourceConfig
from moe_lm.text.files import COMPRESSED_SUFFIXES
from moe_lm.text.sources import source_files

HELD_OUT = 0.05  # of the text
PIECES = 64  # that a text is cut into at least, so that a twentieth of it can be held out
SMALLEST_PIECE, LARGEST_PIECE = 2 << 10, 64 << 10  # bytes
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


def text_bytes(source: SourceConfig) -> int:
    """The bytes of text in a source's files, of compressed ones about."""
    size = sum(
        path.stat().st_size * (COMPRESSED if path.suffix.lower() in COMPRESSED_SUFFIXES else 1)
        for _, path in source_files(source)
    )
    return size if source.max_bytes is None else min(size, source.max_bytes)
