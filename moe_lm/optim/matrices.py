"""Whole matrices out of tensors of which a rank may have slices: who works on which, and how they travel.

One process has its parameters whole. Under plain data parallelism every rank has, and the work is divided. ZeRO divides
the parameters too: a rank has runs of their elements in a flat tensor.

A block is what lies together in a parameter: a matrix, or of an expert's stack `[E, in, m * out]` the m matrices that
one expert has side by side.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Float32 bytes of the matrices in a batch: those that a rank works on at once or, where all ranks have all of them,
# those of all ranks. A single matrix may be larger. What a rank sends to others, and what the work needs beside it, is
# not counted.
BATCH_BYTES = 128 * 2**20


class Part(NamedTuple):
    """A run of a parameter's elements in one of the tensors that an optimizer steps."""

    parameter: int  # its number in the group
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # the first of its elements that is here
    length: int
    tensor: int  # number of the tensor
    offset: int  # in that tensor, of the first element


class Ranks(Protocol):
    """The ranks among which a group of parameters is divided."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        ...

    def swap(self, sent: Tensor, sizes: list[int], arriving: list[int]) -> Tensor:
        """Send `sizes` elements of a flat tensor to each rank; what arrives from each, in order."""
        ...

    def collect(self, tensor: Tensor) -> Tensor:
        """The flat tensors of all ranks, which have one size, in order."""
        ...


@dataclass(frozen=True)
class Share:
    """Where the elements of a group's parameters are: the parts of every rank, or one list if all ranks have them."""

    parts: Sequence[Sequence[Part]]
    ranks: Ranks | None = None  # None: there is one

    @property
    def divided(self) -> bool:
        return len(self.parts) > 1

    @property
    def own(self) -> Sequence[Part]:
        return self.parts[self.ranks.rank if self.ranks is not None and self.divided else 0]


ShareOf = Callable[[Sequence[Tensor]], Share]  # the tensors of a group


def whole(tensors: Sequence[Tensor], ranks: Ranks | None = None) -> Share:
    """Every rank has these parameters whole."""
    return Share([[Part(n, tuple(t.shape), 0, t.numel(), n, 0) for n, t in enumerate(tensors)]], ranks)


class Run(NamedTuple):
    """Elements that lie one after another both at the rank that holds them and in the batch of the rank that works."""

    holder: int
    tensor: int
    offset: int
    worker: int
    place: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Blocks of one shape: as many of every rank as it works on at once."""

    rows: int
    columns: int
    stacked: bool  # [..., in, out]; else [out, in]
    counts: list[int]  # by rank
    runs: list[Run]  # by worker, then by place


class Travel:
    """Brings the blocks of a group to the ranks that work on them, batch by batch, and the results back.

    All ranks know the parts of all, and come to the same batches without a word. What travels is of the `dtype` that
    the work is done in, on `device`.
    """

    def __init__(self, share: Share, dtype: torch.dtype, device: torch.device) -> None:
        self._ranks, self._divided = share.ranks, share.divided
        self._me, self._size = (0, 1) if share.ranks is None else (share.ranks.rank, share.ranks.size)
        self._dtype, self._device = dtype, device
        self.batches = list(batches(share.parts, self._size))

    def there(self, batch: Batch, tensors: Sequence[Tensor]) -> Tensor:
        """The blocks that this rank works on, `[N, rows, columns]`, out of the ranks' flat tensors."""
        if self._ranks is not None and self._divided:
            sent = [run for run in batch.runs if run.holder == self._me]
            arriving = sorted((run for run in batch.runs if run.worker == self._me), key=lambda run: run.holder)
            flat = self._ranks.swap(
                self._joined(tensors[run.tensor].narrow(0, run.offset, run.length) for run in sent),
                self._sizes(sent, "worker"),
                self._sizes(arriving, "holder"),
            )
            pieces = zip(arriving, flat.split([run.length for run in arriving]), strict=True)
            flat = self._joined(piece for _, piece in sorted(pieces, key=lambda pair: pair[0].place))
        else:
            own = (run for run in batch.runs if run.worker == self._me)
            flat = self._joined(tensors[run.tensor].narrow(0, run.offset, run.length) for run in own)
        return flat.view(batch.counts[self._me], batch.rows, batch.columns)

    def back(self, batch: Batch, results: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """The places of a batch in this rank's flat tensors, each with its results."""
        flat, runs = results.reshape(-1), batch.runs
        if self._ranks is not None and self._divided:
            runs = [run for run in batch.runs if run.holder == self._me]
            sent = sorted((run for run in batch.runs if run.worker == self._me), key=lambda run: run.holder)
            flat = self._ranks.swap(
                self._joined(flat.narrow(0, run.place, run.length) for run in sent),
                self._sizes(sent, "holder"),
                self._sizes(runs, "worker"),
            )
            pieces = flat.split([run.length for run in runs])
        else:
            room = max(batch.counts) * batch.rows * batch.columns
            if self._ranks is not None:
                flat = self._ranks.collect(F.pad(flat, (0, room - len(flat))))
            pieces = tuple(flat.narrow(0, run.worker * room + run.place, run.length) for run in runs)
        for run, piece in zip(runs, pieces, strict=True):
            place = tensors[run.tensor].narrow(0, run.offset, run.length)
            yield place, piece.to(place.device)

    def _joined(self, pieces: Iterator[Tensor]) -> Tensor:
        listed = list(pieces)
        if not listed:
            return torch.empty(0, dtype=self._dtype, device=self._device)
        return torch.cat(listed).to(self._device, self._dtype)

    def _sizes(self, runs: Sequence[Run], by: str) -> list[int]:
        sizes = [0] * self._size
        for run in runs:
            sizes[getattr(run, by)] += run.length
        return sizes


class _Slice(NamedTuple):
    holder: int
    tensor: int
    offset: int
    start: int  # in its block
    length: int


class _Block(NamedTuple):
    rows: int
    columns: int
    stacked: bool
    slices: list[_Slice]

    @property
    def cost(self) -> int:
        """Of products with its smaller square."""
        return self.rows * self.columns * min(self.rows, self.columns)


def batches(parts: Sequence[Sequence[Part]], ranks: int) -> Iterator[Batch]:
    """Blocks of one shape with one another, so many at once as BATCH_BYTES has room for."""
    blocks, divided = _blocks(parts), len(parts) > 1
    queues: dict[tuple[int, int, bool], list[list[_Block]]] = defaultdict(lambda: [[] for _ in range(ranks)])
    for block, worker in zip(blocks, _workers(blocks, ranks), strict=True):
        queues[block.rows, block.columns, block.stacked][worker].append(block)
    for (rows, columns, stacked), by_worker in queues.items():
        at_once = max(1, BATCH_BYTES // (4 * rows * columns * (1 if divided else ranks)))
        for first in range(0, max(map(len, by_worker)), at_once):
            now = [queue[first : first + at_once] for queue in by_worker]
            runs = _joined_runs(_runs(now, rows * columns, divided))
            yield Batch(rows, columns, stacked, list(map(len, now)), list(runs))


def _blocks(parts: Sequence[Sequence[Part]]) -> list[_Block]:
    """The blocks in the order of the parameters, each with its slices in order."""
    found: dict[tuple[int, int], _Block] = {}
    for holder, held in enumerate(parts):
        for part in held:
            rows, columns = part.shape[-2:]
            size, end = rows * columns, part.start + part.length
            for number in range(part.start // size, math.ceil(end / size)):
                first, last = max(part.start, number * size), min(end, (number + 1) * size)
                block = found.setdefault((part.parameter, number), _Block(rows, columns, len(part.shape) > 2, []))
                offset = part.offset + first - part.start
                block.slices.append(_Slice(holder, part.tensor, offset, first - number * size, last - first))
    return [found[key] for key in sorted(found)]


def _workers(blocks: Sequence[_Block], ranks: int) -> list[int]:
    """For each block the rank with the most of it, or the one with least to do if that has its share already."""
    share, load, workers = sum(block.cost for block in blocks) / ranks, [0] * ranks, [0] * len(blocks)
    for number in sorted(range(len(blocks)), key=lambda number: -blocks[number].cost):
        block = blocks[number]
        worker = max(block.slices, key=lambda part: part.length).holder
        if load[worker] + block.cost > share:
            worker = load.index(min(load))
        workers[number] = worker
        load[worker] += block.cost
    return workers


def _runs(now: Sequence[Sequence[_Block]], size: int, divided: bool) -> Iterator[Run]:
    """The slices of the blocks of each worker; where every rank has all, the worker takes its own."""
    for worker, blocks in enumerate(now):
        for number, block in enumerate(blocks):
            for part in block.slices:
                holder = part.holder if divided else worker
                yield Run(holder, part.tensor, part.offset, worker, number * size + part.start, part.length)


def _joined_runs(runs: Iterator[Run]) -> Iterator[Run]:
    """Runs that go on where another ends, as one."""
    last: Run | None = None
    for run in runs:
        if last is not None and _goes_on(last, run):
            last = last._replace(length=last.length + run.length)
        else:
            if last is not None:
                yield last
            last = run
    if last is not None:
        yield last


def _goes_on(run: Run, other: Run) -> bool:
    ends = run._replace(offset=run.offset + run.length, place=run.place + run.length)
    return ends[:-1] == other[:-1]
