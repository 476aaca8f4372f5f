"""Muon and LAMB where ranks have slices of the matrices: the weights are those of one process.

Ranks are threads, which swap through a list.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from moe_lm.optim import matrices
from moe_lm.optim.lamb import Lamb
from moe_lm.optim.matrices import Part, Share, ShareOf, Travel, whole
from moe_lm.optim.muon import Muon
from tests.tiny import random

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(8, 12), (12, 8), (3, 8, 12), (8, 12), (5, 6, 4), (7, 4)]
STACKS = [(3, 8, 12), (2, 6, 4)]  # of two matrices side by side
Cut = Literal["together", "one by one", "whole"]


@dataclass
class Meeting:
    """Where the threads that stand for ranks leave what the others take."""

    size: int
    left: list[Any] = field(default_factory=list)
    exchanged: int = 0  # elements that went to another rank

    def __post_init__(self) -> None:
        self.left, self.barrier = [None] * self.size, threading.Barrier(self.size, timeout=10)


@dataclass
class Threads:
    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def exchange(self, mine: Any) -> list[Any]:
        self.meeting.left[self.rank] = mine
        self.meeting.barrier.wait()
        found = list(self.meeting.left)
        self.meeting.barrier.wait()
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.exchange(tensor)).sum(0)

    def swap(self, sent: Tensor, sizes: list[int], arriving: list[int]) -> Tensor:
        assert (sum(sizes), len(sizes)) == (len(sent), self.size)
        pieces = [pieces[self.rank] for pieces in self.exchange(sent.split(sizes))]
        assert list(map(len, pieces)) == arriving
        return torch.cat(pieces)

    def collect(self, tensor: Tensor) -> Tensor:
        return torch.cat(self.exchange(tensor))


def share_of(shapes: Sequence[tuple[int, ...]], cut: Cut, ranks: Threads) -> Share:
    """As ZeRO 1 and 2 cut the parameters, and as ZeRO 3 does."""
    size = ranks.size
    parts: list[list[Part]] = [[] for _ in range(size)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if cut == "together":
        each = -(-sum(sizes) // size)
        for rank in range(size):
            begin, offset = rank * each, 0
            for number, (shape, numel) in enumerate(zip(shapes, sizes, strict=True)):
                first, last = max(offset, begin), min(offset + numel, begin + each)
                if first < last:
                    parts[rank].append(Part(number, shape, first - offset, last - first, 0, first - begin))
                offset += numel
    else:
        for rank in range(size):
            offset = 0
            for number, (shape, numel) in enumerate(zip(shapes, sizes, strict=True)):
                each = -(-numel // size)
                length = min(each, numel - rank * each)
                if length > 0:
                    parts[rank].append(Part(number, shape, rank * each, length, 0, offset))
                offset += each
    return Share(parts, ranks)


def flat_of(share: Share, rank: int, parameters: Sequence[Tensor]) -> Tensor:
    flat = torch.zeros(max(part.offset + part.length for part in share.parts[rank]) + 3)  # and padding
    for part in share.parts[rank]:
        values = parameters[part.parameter].flatten()[part.start : part.start + part.length]
        flat[part.offset : part.offset + part.length] = values
    return flat


Build = Callable[[list[nn.Parameter], int, ShareOf], torch.optim.Optimizer]


def muon(tensors: list[nn.Parameter], side_by_side: int, share: ShareOf) -> torch.optim.Optimizer:
    group = {"params": tensors, "matrices": side_by_side}
    return Muon([group], lr=0.1, momentum=0.9, weight_decay=0.5, share_of=share)


def lamb(tensors: list[nn.Parameter], side_by_side: int, share: ShareOf) -> torch.optim.Optimizer:
    group = {"params": tensors, "matrices": side_by_side, "weight_decay": 0.1}
    return Lamb([group], lr=0.1, betas=(0.8, 0.9), eps=1e-6, share_of=share)


def gradients(shapes: Sequence[tuple[int, ...]], step: int) -> list[Tensor]:
    return [random(*shape, seed=100 * step + n) * 3.0**n for n, shape in enumerate(shapes)]


def in_one_process(build: Build, shapes: Sequence[tuple[int, ...]], side_by_side: int, steps: int = 3) -> list[Tensor]:
    parameters = [nn.Parameter(random(*shape, seed=n)) for n, shape in enumerate(shapes)]
    optimizer = build(parameters, side_by_side, whole)
    for step in range(1, steps + 1):
        for parameter, gradient in zip(parameters, gradients(shapes, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def on_ranks(
    build: Build, shapes: Sequence[tuple[int, ...]], side_by_side: int, size: int, cut: Cut, steps: int = 3
) -> list[tuple[Share, list[Tensor]]]:
    """The share and the tensors of every rank after the steps."""
    start = [random(*shape, seed=n) for n, shape in enumerate(shapes)]
    meeting = Meeting(size)

    def run(rank: int) -> tuple[Share, list[Tensor]]:
        ranks = Threads(meeting, rank)
        share = whole(start, ranks) if cut == "whole" else share_of(shapes, cut, ranks)

        def given(values: list[Tensor]) -> list[Tensor]:
            return [value.clone() for value in values] if cut == "whole" else [flat_of(share, rank, values)]

        tensors = [nn.Parameter(tensor) for tensor in given(start)]
        optimizer = build(tensors, side_by_side, lambda _: share)
        for step in range(1, steps + 1):
            for tensor, gradient in zip(tensors, given(gradients(shapes, step)), strict=True):
                tensor.grad = gradient
            optimizer.step()
        return share, [tensor.detach() for tensor in tensors]

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("limit", [matrices.BATCH_BYTES, 4 * 100])
@pytest.mark.parametrize(("size", "cut"), [(2, "together"), (5, "together"), (3, "one by one"), (3, "whole")])
@pytest.mark.parametrize(
    ("build", "shapes", "side_by_side"),
    [(muon, SHAPES, 1), (muon, STACKS, 2), (lamb, SHAPES, 1), (lamb, STACKS, 2), (lamb, [(7,), (5,), (9,)], 1)],
)
def test_slices_of_matrices_move_as_whole_ones(
    build: Build,
    shapes: list[tuple[int, ...]],
    side_by_side: int,
    size: int,
    cut: Cut,
    limit: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a small limit every batch has one matrix of each rank."""
    expected = in_one_process(build, shapes, side_by_side)
    monkeypatch.setattr(matrices, "BATCH_BYTES", limit)
    for rank, (share, tensors) in enumerate(on_ranks(build, shapes, side_by_side, size, cut)):
        wanted = expected if cut == "whole" else [flat_of(share, rank, expected)]
        for tensor, want in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(tensor, want, rtol=2e-5, atol=2e-5)


def test_ranks_that_have_the_same_end_with_the_same_bits() -> None:
    first, *others = (tensors for _, tensors in on_ranks(muon, SHAPES, 1, 3, "whole"))
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("cut", ["together", "one by one", "whole"])
def test_every_matrix_has_one_worker_and_the_work_is_shared(cut: Cut) -> None:
    shapes = [(16, 16)] * 12 + [(6, 16, 16)]
    ranks = Threads(Meeting(3), 0)
    share = whole([torch.empty(shape) for shape in shapes], ranks) if cut == "whole" else share_of(shapes, cut, ranks)
    travel = Travel(share, torch.float32, torch.device("cpu"))
    counts = torch.tensor([batch.counts for batch in travel.batches]).sum(0)
    assert counts.tolist() == [6, 6, 6]
    lengths = [run.length for batch in travel.batches for run in batch.runs]
    assert sum(lengths) == 18 * 16 * 16


def test_a_batch_has_no_more_than_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "BATCH_BYTES", 4 * 2 * 96)
    travel = Travel(whole([torch.empty(shape) for shape in [(5, 8, 12), (40, 40)]]), torch.float32, torch.device("cpu"))
    assert [batch.counts for batch in travel.batches] == [[2], [2], [1], [1]]
    shared = whole([torch.empty(6, 8, 12)], Threads(Meeting(2), 0))
    assert [batch.counts for batch in Travel(shared, torch.float32, torch.device("cpu")).batches] == [[1, 1]] * 3
    halves = [[Part(0, (6, 8, 12), 288 * rank, 288, 0, 0)] for rank in range(2)]  # each rank works on its own
    divided = Travel(Share(halves, Threads(Meeting(2), 0)), torch.float32, torch.device("cpu"))
    assert [batch.counts for batch in divided.batches] == [[2, 2], [1, 1]]


def test_what_lies_together_travels_together() -> None:
    """A stack that one rank has whole is one run, not one for every expert."""
    travel = Travel(whole([torch.empty(5, 8, 12)]), torch.float32, torch.device("cpu"))
    (batch,) = travel.batches
    assert [run.length for run in batch.runs] == [5 * 96]
