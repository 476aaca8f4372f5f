"""Where documents begin, told by the tokens themselves: no index is looked up, however much data there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Marks(NamedTuple):
    """The ids around documents. Text never gives them (tokenizer/tokenizer.py).

    A document of ours begins with `bos` behind the `eos` of the one before. Where nothing begins a document (`bos` is
    None, as in files of other programs) it begins behind an `eos`, and nowhere else: one that is open at the end of a
    file goes on in the next, whose first token is its `eos` where programs write that before each document.
    """

    bos: int | None
    eos: int

    def begins(self, tokens: NDArray[Any]) -> NDArray[np.bool_]:
        """Where documents begin in windows [n, length + 1]: at i, whether token i + 1 begins one. [n, length]

        The first token of a window is not asked about.
        """
        found = tokens[:, :-1] == self.eos
        if self.bos is None:
            return found
        found &= tokens[:, 1:] == self.bos
        if self.bos == self.eos:
            for row in np.flatnonzero((found[:, 1:] & found[:, :-1]).any(axis=1)).tolist():
                found[row] = _second_marks(tokens[row] == self.eos)
        return found


def _second_marks(is_mark: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`begins` of a window with three marks in a row, which documents without a token leave, where bos is eos.

    The first mark behind text is an eos, and the last before text a bos; the others alternate.
    """
    begins = np.zeros(len(is_mark), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_mark, [False]])))
    for first, end in edges.reshape(-1, 2).tolist():
        if first == 0 and end < len(is_mark):
            begins[end - 1 :: -2] = is_mark[end - 1 :: -2]
        else:
            begins[first + 1 : end : 2] = True
    return begins[1:]
