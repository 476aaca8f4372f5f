"""Batches from a seed: packed documents with padding, many targets in a row, few or none; or pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moe_lm.data.batches import IGNORE, Batch
from moe_lm.data.packing import Example, pack_examples
from moe_lm.data.pairs import SIDES, Pair, pack_pairs
from moe_lm.engine.engine import Engine
from moe_lm.tools.verify.scale import BATCH, LENGTH, PAD, VOCABULARY
from moe_lm.train.reference import gather_log_probs

DOCUMENTS = 2  # in a row; or this many pairs


@dataclass(frozen=True)
class Documents:
    """A batch source. A step has the same documents whether they are `packed` or each has a row of its own."""

    seed: int
    packed: bool = True
    fingerprint: str = "synthetic"

    def batch(self, step: int, rows: range) -> Batch:
        if self.packed:
            found = [self._row(step, row) for row in rows]
        else:
            found = [[self._row(step, row // DOCUMENTS)[row % DOCUMENTS]] for row in rows]
        return pack_examples(found, LENGTH, PAD)[0]

    def _row(self, step: int, row: int) -> list[Example]:
        draw = np.random.default_rng([self.seed, step, row])
        used = LENGTH if row == 0 else int(draw.integers(6, LENGTH))
        tokens = _tokens(draw, used + 1)
        trained = draw.random(used) < (0.0, 0.2, 0.9, 1.0)[(row + step + 2) % 4]
        targets = np.where(trained, tokens[1:], IGNORE)
        cut = used // 3
        return [Example(tokens[:cut], targets[:cut]), Example(tokens[cut:-1], targets[cut:])]


@dataclass(frozen=True)
class Pairs:
    """A batch source of pairs, `packed` DOCUMENTS to a row or each in a row of its own; some rows have none."""

    seed: int
    packed: bool = True
    fingerprint: str = "synthetic pairs"
    reference: dict[int, Tensor] = field(default_factory=dict)  # by step: [pairs, 2]

    def add_reference(self, engine: Engine, steps: range) -> None:
        """Compute the reference log-probabilities of these steps with the engine's model, as a run does."""
        rows = range(BATCH if self.packed else BATCH * DOCUMENTS)
        for step in steps:
            self.reference[step] = gather_log_probs(engine, [self._pack(step, rows[row : row + 1]) for row in rows])

    def batch(self, step: int, rows: range) -> Batch:
        batch = self._pack(step, rows)
        first = len(self._pairs(step, range(rows.start)))
        return replace(batch, reference=self.reference[step][first : first + batch.num_pairs])

    def _pack(self, step: int, rows: range) -> Batch:
        return pack_pairs([self._pairs(step, rows[n : n + 1]) for n in range(len(rows))], LENGTH, PAD)

    def _pairs(self, step: int, rows: range) -> list[Pair]:
        """The pairs in these rows, in order. Two halves of a batch have different numbers of them."""
        places = range(rows.start * DOCUMENTS, rows.stop * DOCUMENTS) if self.packed else rows
        return [self._pair(step, place) for place in places if (step + place) // DOCUMENTS % 3 != 1]

    def _pair(self, step: int, place: int) -> Pair:
        draw = np.random.default_rng([self.seed, step, place])
        room = LENGTH // DOCUMENTS // SIDES
        prompt = _tokens(draw, int(draw.integers(2, room - 1)))
        sides = []
        for _ in range(SIDES):
            tokens = np.concatenate([prompt, _tokens(draw, int(draw.integers(1, room + 2 - len(prompt))))])
            trained = np.arange(1, len(tokens)) >= len(prompt)
            sides.append(Example(tokens[:-1].astype(np.int32), np.where(trained, tokens[1:], IGNORE).astype(np.int32)))
        return Pair(sides[0], sides[1], hash=place)


def _tokens(draw: np.random.Generator, number: int) -> NDArray[np.int64]:
    """Some ids are frequent, as in text."""
    return np.minimum(7 + draw.geometric(0.06, number), VOCABULARY - 1)
