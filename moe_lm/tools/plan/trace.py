"""What one rank does in a step: kernels, exchanges, host synchronisations and memory, by part of the model and by pass.

Passes `ahead`, `forward`, `recompute` and `backward` are those of one micro-batch, `update` is that of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

Part = Literal[
    "embedding", "norms", "attention", "router", "dispatch", "experts", "shared", "dense", "head", "balance", "update"
]
Pass = Literal["ahead", "forward", "recompute", "backward", "update"]
CollectiveKind = Literal["all_to_all", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "other"]
ProductKind = Literal["dense", "grouped", "attention"]

PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]
PASSES: tuple[Pass, ...] = Pass.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Product:
    """Matrix products of one shape. A grouped product's `rows` are those of all its groups together.

    Of attention `rows` are query tokens, `columns` the head size of the values, `inner` that of the keys, `groups` the
    query heads.
    """

    kind: ProductKind
    rows: int
    columns: int
    inner: int
    groups: int
    flops: int  # of one; attention with the causal half of the scores
    bytes: int  # of one: its operands and its result
    element_size: int  # bytes of a number that is multiplied
    count: int = 1


@dataclass(frozen=True)
class Work:
    """The kernels of a part in a pass."""

    products: tuple[Product, ...] = ()
    bytes: int = 0  # moved by kernels that are not matrix products
    launches: int = 0  # of kernels, products included

    def flops(self, *kinds: ProductKind) -> int:
        """FLOPs of products of these kinds, or of all."""
        return sum(p.flops * p.count for p in self.products if not kinds or p.kind in kinds)

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.bytes + other.bytes, self.launches + other.launches)

    def times(self, count: int) -> Work:
        products = tuple(Product(**{**vars(p), "count": p.count * count}) for p in self.products)
        return Work(products, self.bytes * count, self.launches * count)


@dataclass(frozen=True)
class Collective:
    """An exchange between ranks."""

    kind: CollectiveKind
    bytes: int  # of this rank's larger side: what it gives or what it gets
    ranks: tuple[int, ...]  # of its group, ascending
    part: Part
    during: Pass
    times: int  # a step
    hidden_by: Work = Work()  # kernels that are queued between its start and the wait for it, each time
    waits_for_host: bool = False  # the host, too, waits for its result


@dataclass(frozen=True)
class HostSync:
    """A place where the host waits for the device."""

    part: Part
    during: Pass
    operator: str  # such as `aten._local_scalar_dense`
    where: str  # such as `moe_lm/parallel/expert_parallel.py:72`
    times: int  # in its pass
    expected: bool  # the read of an exchange's counts


@dataclass(frozen=True)
class Finding:
    """A mistake that costs time or memory on a GPU, with its place."""

    kind: Literal["hidden sync", "float32 rows", "all logits", "data-dependent shape"]
    part: Part
    during: Pass
    where: str
    text: str  # a sentence


@dataclass(frozen=True)
class Memory:
    """Bytes on one device over a step."""

    weights: int
    gradients: int  # that are kept from one micro-batch to the next
    optimizer: int  # master weights and moments
    zero: int  # ZeRO's own: partition copies, flat buffers, buckets
    communication: int  # an allowance for NCCL and the device's context
    activations: int  # kept from forward to backward, at their most
    peak: int
    peak_during: str  # such as `backward, layer 27, experts`
    saved: Mapping[Part, int] = field(default_factory=dict)  # `activations`, by part

    @property
    def resident(self) -> int:
        """What is there before the first forward pass."""
        return self.weights + self.gradients + self.optimizer + self.zero + self.communication


@dataclass(frozen=True)
class Trace:
    """One rank's step."""

    world_size: int
    rank: int
    device: str
    tokens: int  # of a micro-batch on this rank
    micro_batches: int  # of a step
    work: Mapping[tuple[Pass, Part], Work]
    collectives: tuple[Collective, ...]
    syncs: tuple[HostSync, ...]
    findings: tuple[Finding, ...]
    memory: Memory

    def times(self, during: Pass) -> int:
        """How often a step has this pass."""
        return 1 if during == "update" else self.micro_batches

    def of(self, passes: Iterable[Pass] = PASSES, parts: Iterable[Part] = PARTS) -> Work:
        """The kernels of these passes and parts, each pass once."""
        passes, parts = set(passes), set(parts)
        chosen = (work for (during, part), work in self.work.items() if during in passes and part in parts)
        return reduce(Work.__add__, chosen, Work())

    @property
    def step(self) -> Work:
        """The kernels of a step."""
        return reduce(Work.__add__, (work.times(self.times(during)) for (during, _), work in self.work.items()), Work())
