"""The held-out split: which documents are kept for validation, decided by a hash of their ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def held_out(document_id: str, validation_fraction: float) -> bool:
    """Whether a document is held out, by its id and the fraction only; `held_out_below` holds out at least one."""
    return document_hash(document_id) < hashes_below(validation_fraction)


def held_out_of(hashes: NDArray[np.uint64], validation_fraction: float) -> NDArray[np.bool_]:
    """`held_out` for the document hashes [n] of a whole corpus: at least one of two or more, never the only one."""
    lowest = [int(hashes.min())] if len(hashes) else []
    limit = held_out_below(lowest, len(hashes), validation_fraction)
    return hashes < np.uint64(limit)


def held_out_below(lowest: Sequence[int], documents: int, validation_fraction: float) -> int:
    """The hash below which documents are held out, of a corpus with these `lowest` hashes (of its parts, say).

    At least one of two or more documents is held out, and never the only one.
    """
    if validation_fraction == 0 or documents < 2:
        return 0
    return max(hashes_below(validation_fraction), min(lowest) + 1)


def document_hash(document_id: str) -> int:
    """A hash of 64 evenly distributed bits."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8")).digest()[:8], "big")


def hashes_below(validation_fraction: float) -> int:
    """The hash below which a share of all documents has its hashes."""
    return int(validation_fraction * 2**64)
