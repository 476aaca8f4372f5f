"""What optimizers of whole matrices add to an update: Muon's Newton-Schulz and the travels of matrices, LAMB's norms.

Which rank works on which matrix is for the optimizer to say (optim/matrices.py); here are the parameters as ZeRO cuts
them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from moe_lm.optim.matrices import Batch, Part, batches
from moe_lm.optim.muon import STEPS
from moe_lm.tools.plan.trace import Collective, Product, Work

FLOAT32 = 4  # bytes
NORMS = 3  # of each matrix: LAMB's weights, direction and update
BATCH_LAUNCHES = 16  # of a batch of matrices beside its products: put together, normed, laid out, added to the weights
PARAMETER_LAUNCHES = 20  # of a parameter's update: LAMB's; Muon has fewer


@dataclass(frozen=True)
class Matrices:
    """Parameters that an optimizer takes apart into matrices, `side_by_side` of them in each block."""

    rule: Literal["muon", "lamb"]
    shapes: tuple[tuple[int, ...], ...]
    side_by_side: int
    element_size: int  # bytes of the numbers that Muon multiplies and sends

    @property
    def numbers(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def count(self) -> int:
        return self.side_by_side * sum(math.prod(shape[:-2]) for shape in self.shapes)


def work(matrices: Matrices, stage: int, ranks: int) -> Work:
    """The products and launches of the rank that has most to do of each batch; bytes are counted with the update's."""
    launches = PARAMETER_LAUNCHES * len(matrices.shapes)
    if matrices.rule == "lamb":
        return Work(launches=launches)
    found: Counter[Product] = Counter()
    for batch in planned(stage, matrices.shapes, ranks):
        many, columns = max(batch.counts) * matrices.side_by_side, batch.columns // matrices.side_by_side
        for product in newton_schulz(many, batch.rows, columns, matrices.element_size):
            found[replace(product, count=1)] += product.count
        launches += 3 * STEPS + BATCH_LAUNCHES
    return Work(tuple(replace(product, count=n) for product, n in found.items()), launches=launches)


def newton_schulz(matrices: int, rows: int, columns: int, element_size: int) -> Iterator[Product]:
    """The products of matrices of one shape: in each step x @ x.mT, its square, and that times x."""
    small, large = sorted((rows, columns))
    for inner, out, operands in (
        (large, small, 2 * small * large),
        (small, small, 3 * small * small),  # baddbmm reads what it adds to
        (small, large, small * small + 2 * small * large),
    ):
        flops = 2 * matrices * small * inner * out
        moved = matrices * (operands + small * out) * element_size
        yield Product("dense", matrices * small, out, inner, matrices, flops, moved, element_size, STEPS)


def exchanges(matrices: Matrices, stage: int, ranks: tuple[int, ...]) -> list[Collective]:
    """What ranks send each other in the update. An `all_to_all` has the bytes of the rank that sends or gets most."""
    size = len(ranks)
    if size == 1:
        return []
    if matrices.rule == "lamb":
        norms = NORMS * FLOAT32 * matrices.count
        return [Collective("all_reduce", norms, ranks, "update", "update", 1)] if stage else []
    found: Counter[Collective] = Counter()
    for batch in planned(stage, matrices.shapes, size):
        if not stage:  # every rank has all gradients, and needs all results
            moved = size * max(batch.counts) * batch.rows * batch.columns * matrices.element_size
            found[Collective("all_gather", moved, ranks, "update", "update", 1)] += 1
            continue
        # There and back; an all-to-all's bytes contain an even share that a rank sends to itself.
        moved = travelled(batch, size) * matrices.element_size * size // (size - 1)
        found[Collective("all_to_all", moved, ranks, "update", "update", 1)] += 2
    return [replace(one, times=times) for one, times in found.items()]


def travelled(batch: Batch, ranks: int) -> int:
    """Elements of a batch that the busiest rank gives away or gets, whichever is more."""
    given, got = [0] * ranks, [0] * ranks
    for run in batch.runs:
        if run.holder != run.worker:
            given[run.holder] += run.length
            got[run.worker] += run.length
    return max(*given, *got)


@cache
def planned(stage: int, shapes: tuple[tuple[int, ...], ...], ranks: int) -> tuple[Batch, ...]:
    """The batches of these parameters under a stage of ZeRO; stage 0 is DDP."""
    return tuple(batches(cut(stage, shapes, ranks), ranks))


def cut(stage: int, shapes: Sequence[tuple[int, ...]], ranks: int) -> list[list[Part]]:
    """The parts of every rank: stages 1 and 2 cut all parameters together, stage 3 each."""
    sizes = list(map(math.prod, shapes))
    if stage == 0:
        return [[Part(n, shape, 0, size, n, 0) for n, (shape, size) in enumerate(zip(shapes, sizes, strict=True))]]
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    piece, begin = -(-sum(sizes) // ranks), 0
    offset = 0  # stage 3's, the same on every rank
    for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True)):
        if stage == 3:
            piece, begin = -(-size // ranks), 0
        for rank in range(begin // piece, min(ranks, -(-(begin + size) // piece))):
            first, last = max(begin, rank * piece), min(begin + size, (rank + 1) * piece)
            place = offset if stage == 3 else first - rank * piece
            parts[rank].append(Part(number, shape, first - begin, last - first, 0, place))
        offset += piece
        begin += size
    return parts
