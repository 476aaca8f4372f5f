"""The held-out split: which documents are kept for validation, decided by a hash of their ids."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def held_out(document_id: str, validation_fraction: float) -> bool:
    """Whether a document is held out, by its id and the fraction only; `held_out_of` holds out at least one."""
    return document_hash(document_id) < _limit(validation_fraction)


def held_out_of(hashes: NDArray[np.uint64], validation_fraction: float) -> NDArray[np.bool_]:
    """`held_out` for the document hashes [n] of a whole corpus: at least one of two or more, never the only one."""
    if validation_fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), np.bool_)
    return hashes < np.uint64(max(_limit(validation_fraction), int(hashes.min()) + 1))


def document_hash(document_id: str) -> int:
    """A hash of 64 evenly distributed bits."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8")).digest()[:8], "big")


def _limit(validation_fraction: float) -> int:
    return int(validation_fraction * 2**64)
