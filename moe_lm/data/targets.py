"""What each position is trained to say: the next token, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IGNORE = -100  # the target of a position that is not trained


def next_tokens(ids: Sequence[int], trained: Sequence[bool]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Inputs and targets [tokens - 1] of a sequence of ids, where `trained` says which of them are to be learnt."""
    tokens = np.array(ids, np.int32)
    return tokens[:-1], np.where(trained[1:], tokens[1:], np.int32(IGNORE))
