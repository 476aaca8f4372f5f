"""Sequence parallelism on ranks that are threads of this process: attention and the balance loss are those of one rank.

Whole steps are compared by `moe-lm verify` (tests/tools/verify), whole runs in tests/distributed/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

from moe_lm.data.batches import Batch
from moe_lm.kernels.kernels import ATTENTION
from moe_lm.model.attention import PackedAttention
from moe_lm.model.moe import Routing
from moe_lm.objective.balance import sequence_balance_loss
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.sequence_parallel import SequenceGroup
from moe_lm.parallel.topology import Topology
from tests.tiny import positions_of, random

ROWS, POSITIONS = 2, 12
BOUNDS = torch.tensor([0, 5, 7, 12, 21, 24], dtype=torch.int32)  # of documents, of which some lie on several ranks

T = TypeVar("T")


def on_ranks(size: int, action: Callable[[SequenceGroup, int], T]) -> list[T]:
    """What the action returns on each of so many ranks."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            assert dist.group.WORLD is not None
            return action(SequenceGroup(dist.group.WORLD, Exchange(torch.device("cpu"))), rank)
        finally:
            dist.destroy_process_group()

    with threaded_groups(), ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(run, range(size)))


@contextmanager
def threaded_groups() -> Iterator[None]:
    """Let a thread be a rank."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    try:
        yield
    finally:
        _uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def layer(kernel: str = "plain", scale: float = 0.3) -> Any:
    """What attention reads of its layer."""
    return SimpleNamespace(segment_attention=ATTENTION[kernel], scale=scale)


def inputs(heads: int, key_heads: int, size: int, value_size: int) -> list[Tensor]:
    shapes = ((heads, size), (key_heads, size), (key_heads, value_size), (heads, value_size))
    return [random(ROWS, POSITIONS, *shape, seed=seed) for seed, shape in enumerate(shapes)]


def attended(attend: Any, kernel: str, q: Tensor, k: Tensor, v: Tensor, out_gradient: Tensor) -> list[Tensor]:
    """The result of attention, and the gradients of what it is given."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out: Tensor = attend(layer(kernel), *leaves)
    out.backward(out_gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    ("ranks", "heads", "key_heads", "sizes", "kernel"),
    [
        (2, 4, 4, (8, 8), "plain"),
        (4, 8, 4, (8, 8), "segments"),
        (4, 8, 2, (8, 8), "plain"),  # fewer key heads than ranks
        (4, 12, 6, (8, 8), "segments"),  # a rank's query heads share two key heads unevenly
        (4, 4, 4, (12, 6), "segments"),  # latent attention
        (3, 6, 1, (8, 4), "plain"),
    ],
)  # fmt: skip
def test_attention_of_ranks_that_share_rows_is_that_of_one(
    ranks: int, heads: int, key_heads: int, sizes: tuple[int, int], kernel: str
) -> None:
    """Results and gradients, of packed documents, with grouped keys, and values of another size than keys."""
    whole = inputs(heads, key_heads, *sizes)
    expected = attended(PackedAttention(BOUNDS, POSITIONS), kernel, *whole)

    def rank(group: SequenceGroup, number: int) -> list[Tensor]:
        own = [x.chunk(ranks, dim=1)[number] for x in whole]
        return attended(group.attention(BOUNDS, POSITIONS // ranks), kernel, *own)

    found = on_ranks(ranks, rank)
    for name, want, parts in zip(("out", "q", "k", "v"), expected, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-5, atol=1e-6, msg=name)


def test_a_sequences_balance_loss_is_the_sum_of_its_parts() -> None:
    """It is not linear in the counts. The parts' gradients are those of the whole."""
    experts, chosen, ranks = 8, 3, 4
    logits = random(2, ROWS, POSITIONS, experts, seed=1) * 3  # of two layers
    counted = torch.arange(POSITIONS) < torch.tensor([[POSITIONS], [5]])  # two ranks have none of the second row

    def loss_of(logits: Tensor, counted: Tensor, *over_row: Any) -> tuple[Tensor, Tensor]:
        leaf = logits.flatten(1, 2).clone().requires_grad_()
        scores = leaf.sigmoid()
        loss = sequence_balance_loss(Routing(leaf, scores, scores.topk(chosen).indices, scores), counted, *over_row)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient.unflatten(1, counted.shape)

    def rank(group: SequenceGroup, number: int) -> tuple[Tensor, Tensor]:
        own = logits.chunk(ranks, dim=2)[number], counted.chunk(ranks, dim=1)[number]
        return loss_of(*own, group.sum)

    expected, gradient = loss_of(logits, counted)
    losses, gradients = zip(*on_ranks(ranks, rank), strict=True)
    torch.testing.assert_close(torch.stack(losses).sum(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.cat(gradients, 2), gradient, rtol=1e-5, atol=1e-8)


@pytest.fixture
def alone() -> Iterator[SequenceGroup]:
    """A group of one rank: this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield SequenceGroup(dist.group.WORLD, Exchange(torch.device("cpu")))
    dist.destroy_process_group()


def test_compilation_does_not_stop_at_the_exchanges(alone: SequenceGroup) -> None:
    """Attention with both of its exchanges, forward and backward, is one graph."""
    expected = attended(alone.attention(BOUNDS, POSITIONS), "segments", *inputs(4, 2, 8, 8))
    compiled = torch.compile(alone.attention(BOUNDS, POSITIONS).__call__, backend="eager", fullgraph=True)
    found = attended(compiled, "segments", *inputs(4, 2, 8, 8))
    for want, got in zip(expected, found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_a_rank_that_exchanges_is_known_to_wait(alone: SequenceGroup) -> None:
    """The others see where it is, and its stopwatch stands still."""
    phases: list[str] = []
    seen = alone.exchange.place.at

    def at(phase: str, *step: Any) -> None:
        phases.append(phase)
        seen(phase, *step)

    alone.exchange.place.at = at  # type: ignore[method-assign]
    alone.exchange.place.at("forward")
    attended(alone.attention(BOUNDS, POSITIONS), "segments", *inputs(4, 2, 8, 8))
    alone.sum(torch.ones(3))
    assert phases == ["forward", *["exchange", "forward"] * 5]  # two there, two of gradients, and the sum


def test_ranks_of_a_group_have_the_same_rows_and_each_its_positions() -> None:
    topologies = [Topology(rank, 4, sequence_parallel_size=2) for rank in range(4)]
    assert [topology.rows_of(6) for topology in topologies] == [range(3), range(3), range(3, 6), range(3, 6)]
    assert [Topology(rank, 2).rows_of(6) for rank in range(2)] == [range(3), range(3, 6)]
    ids = torch.arange(ROWS * POSITIONS).view(ROWS, POSITIONS)
    batch = Batch(ids, ids + 1, BOUNDS, max_seqlen=9)
    parts = [batch.part(number, 3) for number in range(3)]
    assert torch.equal(parts[1].input_ids, ids[:, 4:8])
    assert torch.equal(torch.cat([part.targets for part in parts], 1), batch.targets)
    assert torch.equal(torch.cat([positions_of(part) for part in parts], 1), positions_of(batch))
    assert all(torch.equal(part.cu_seqlens, BOUNDS) and part.max_seqlen == 9 for part in parts)
