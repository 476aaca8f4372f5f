"""Batches out of a seed: packed documents of unequal length, padding, rows with many targets, few or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_lm.data.batches import IGNORE, Batch, pack
from moe_lm.verify.scale import LENGTH, PAD, VOCABULARY

DOCUMENTS = 2  # in a row


class Document(NamedTuple):
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """A batch source. The documents of a step are the same, `packed` or each in a row of its own."""

    seed: int
    packed: bool = True
    fingerprint: str = "synthetic"

    def batch(self, step: int, rows: range) -> Batch:
        if self.packed:
            return _batch([self._row(step, row) for row in rows])
        return _batch([[self._row(step, row // DOCUMENTS)[row % DOCUMENTS]] for row in rows])

    def _row(self, step: int, row: int) -> list[Document]:
        draw = np.random.default_rng([self.seed, step, row])
        used = LENGTH if row == 0 else int(draw.integers(6, LENGTH))
        # Some ids are frequent, as in text.
        tokens = np.minimum(7 + draw.geometric(0.06, used + 1), VOCABULARY - 1)
        trained = draw.random(used) < (0.0, 0.2, 0.9, 1.0)[(row + step + 2) % 4]
        targets = np.where(trained, tokens[1:], IGNORE)
        cut = used // 3
        return [Document(tokens[:cut], targets[:cut]), Document(tokens[cut:-1], targets[cut:])]


def _batch(rows: list[list[Document]]) -> Batch:
    input_ids = np.full((len(rows), LENGTH), PAD)
    targets = np.full_like(input_ids, IGNORE)
    bounds = {0, input_ids.size}
    for place, documents in enumerate(rows):
        end = 0
        for document in documents:
            start, end = end, end + len(document.input_ids)
            input_ids[place, start:end] = document.input_ids
            targets[place, start:end] = document.targets
            bounds |= {place * LENGTH + start, place * LENGTH + end}
    return pack(input_ids, targets, np.array(sorted(bounds)))
