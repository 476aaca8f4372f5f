"""The held-out split: which documents are kept from training, by a hash of what they are called."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def held_out(document_id: str, validation_fraction: float) -> bool:
    """Whether a document of this id belongs to the validation split: a matter of its id and the fraction alone.

    One exception: where this holds out no document of a corpus, the one that comes nearest is held out.
    """
    return document_hash(document_id) < _limit(validation_fraction)


def held_out_of(hashes: NDArray[np.uint64], validation_fraction: float) -> NDArray[np.bool_]:
    """`held_out` for a whole corpus by the hashes of its documents [n]: at least one of two or more, none of one."""
    if validation_fraction == 0 or len(hashes) < 2:
        return np.zeros(len(hashes), np.bool_)
    return hashes < np.uint64(max(_limit(validation_fraction), int(hashes.min()) + 1))


def document_hash(document_id: str) -> int:
    """64 bits, evenly spread."""
    return int.from_bytes(hashlib.sha256(document_id.encode("utf-8")).digest()[:8], "big")


def _limit(validation_fraction: float) -> int:
    return int(validation_fraction * 2**64)
