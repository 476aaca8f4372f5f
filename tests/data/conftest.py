"""Token shards made in memory, out of documents given as lists of token ids."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from moe_lm.data.shards import TokenShards

MakeShards = Callable[..., TokenShards]


@pytest.fixture
def make_shards() -> MakeShards:
    def make(documents: Sequence[Sequence[int]], tokens_a_file: int | None = None) -> TokenShards:
        stream = np.array([token for document in documents for token in document], np.uint16)
        lengths = np.array([len(document) for document in documents])
        size = tokens_a_file or len(stream)
        return TokenShards(
            folder=Path("in-memory"),
            split="train",
            files=tuple(stream[start : start + size] for start in range(0, len(stream), size)),
            document_starts=np.cumsum(lengths) - lengths,
            document_bytes=lengths,
            fingerprint="in-memory",
        )

    return make
