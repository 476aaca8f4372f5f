"""The buffers and exchanges that an engine adds to a step, by arithmetic: DDP's, and those of ZeRO by stage.

As in DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py, with the settings of engine/deepspeed_config.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_lm.optim.matrices import BATCH_BYTES
from moe_lm.tools.plan import matrices
from moe_lm.tools.plan.matrices import Matrices
from moe_lm.tools.plan.trace import Collective, CollectiveKind, Pass, Work

FLOAT32 = 4  # bytes
BUCKET = 50_000_000  # elements: reduce_bucket_size, stage3_prefetch_bucket_size
LIVE = 1_000_000_000  # elements that stage 3 keeps whole from forward to backward: stage3_max_reuse_distance
MUON_COPIES = 5  # of a batch: itself, its normed copy, a product, and the squares of square matrices
# Of a parameter's update.
ADAMW_BYTES = 28  # weight, both moments read and written, gradient read
RULE_BYTES = {
    "muon": 52,  # moment, direction and decay, in place; copied together; added
    "lamb": 144,  # moments, direction and update one operation after the other, and three sums of squares
}


@dataclass(frozen=True)
class Group:
    """Trained parameters of a rank that the same ranks hold: the experts, or all others."""

    parameters: int
    weights: int  # bytes, in the data types that are multiplied: what the ranks send each other after the update
    ranks: tuple[int, ...]
    moments: int  # numbers in an optimizer's state, of all ranks
    matrices: tuple[Matrices, ...] = ()  # that Muon or LAMB steps

    @property
    def part(self) -> int:
        """The parameters that this rank updates under ZeRO."""
        return -(-self.parameters // len(self.ranks))


@dataclass(frozen=True)
class State:
    """Bytes of a rank beside its weights."""

    gradients: int  # kept between micro-batches
    optimizer: int
    buffers: int  # during the backward pass
    update: int  # buffers of the update, when there are no activations
    gradients_grow: bool  # one after the other in the backward pass, instead of being there from its start
    weights: int | None = None  # of trained parameters, where the stage divides them


def whole(groups: list[Group], micro_batches: int, world_size: int) -> State:
    """One device, or DDP, whose buckets hold the gradients, as views, from the first step on."""
    parameters = sum(group.parameters for group in groups)
    grow = micro_batches == 1 and world_size == 1
    optimizer = FLOAT32 * sum(group.moments for group in groups)
    return State(0 if grow else FLOAT32 * parameters, optimizer, 0, FLOAT32 * parameters, grow)


def divided(stage: int, groups: list[Group], micro_batches: int, overlaps: bool, offload: bool) -> State:
    """ZeRO of a stage. `overlaps`: gradients are reduced during the backward pass, through two buckets in turns."""
    parameters = sum(group.parameters for group in groups)
    part = sum(group.part for group in groups)
    # On a CPU a bucket takes as much memory as is written to it.
    buckets = FLOAT32 * (2 * BUCKET if overlaps else min(BUCKET, parameters))
    state = part + sum(-(-group.moments // len(group.ranks)) for group in groups)
    optimizer = 0 if offload else FLOAT32 * state
    largest = max((group.part for group in groups), default=0)  # flattened one group after the other
    accumulates = micro_batches > 1
    if stage == 1:
        # Gradients stay whole until the last micro-batch; then the rank's own are copied together.
        if overlaps and not accumulates:
            return State(0, optimizer, FLOAT32 * part + buckets, FLOAT32 * (part + largest), False)
        kept = FLOAT32 * parameters if accumulates else 0
        if overlaps:
            return State(kept, optimizer, FLOAT32 * part + buckets, FLOAT32 * (parameters + part) + buckets, False)
        # Reduced after the backward pass. What is copied together takes the place of what it is copied from.
        return State(
            kept, optimizer, 0, FLOAT32 * max(parameters + buckets // FLOAT32, part + largest), not accumulates
        )
    if stage == 2:
        kept = FLOAT32 * part if accumulates else 0
        if overlaps:
            return State(kept, optimizer, FLOAT32 * part + buckets, FLOAT32 * (part + largest), False)
        # As far as it is written: when the backward pass ends, and there are no activations.
        return State(kept, optimizer, buckets, kept + FLOAT32 * part + max(buckets, FLOAT32 * largest - kept), False)
    weights = sum(group.weights for group in groups)
    live = weights * min(parameters, LIVE) // max(1, parameters)
    held = sum(-(-group.weights // len(group.ranks)) for group in groups)
    return State(FLOAT32 * part, optimizer, buckets + live, FLOAT32 * largest, False, weights=held)


def orthogonalising(groups: list[Group]) -> int:
    """Bytes in which Muon works: a batch of matrices, what it was put together from, and products of Newton-Schulz."""
    hidden = [sum(some.numbers for some in group.matrices if some.rule == "muon") for group in groups]
    largest = max((FLOAT32 * n // len(group.ranks) for n, group in zip(hidden, groups, strict=True)), default=0)
    return MUON_COPIES * min(BATCH_BYTES, largest)


def exchanges(stage: int, groups: list[Group], micro_batches: int, backward: Work, overlaps: bool) -> list[Collective]:
    """What ranks send each other of gradients and weights; stage 0 is DDP."""
    hidden = backward if overlaps else Work()
    found = []
    for group in groups:
        if len(group.ranks) == 1 or not group.parameters:
            continue
        size, moved = FLOAT32 * group.parameters, group.weights
        reductions = micro_batches if stage >= 2 else 1
        kind: CollectiveKind = "reduce_scatter" if stage == 3 else "all_reduce"
        found.append(Collective(kind, size, group.ranks, "update", "backward", reductions, hidden))
        if stage in (1, 2):
            found.append(Collective("all_gather", moved, group.ranks, "update", "update", 1))
        if stage == 3:
            passes: tuple[Pass, ...] = ("forward", "backward")
            for during in passes:
                found.append(Collective("all_gather", moved, group.ranks, "update", during, micro_batches, hidden))
        for some in group.matrices:
            found += matrices.exchanges(some, stage, group.ranks)
    return found


def update(stage: int, groups: list[Group]) -> Work:
    """Gradient norm, clipping, the optimizer; under ZeRO also the copies that make gradients and weights flat."""
    parameters = sum(group.part if stage else group.parameters for group in groups)
    bytes_ = ADAMW_BYTES + 3 * FLOAT32
    if stage in (1, 2):
        bytes_ += 4 * FLOAT32 + FLOAT32  # gradients copied together, then flattened; weights copied back
    found = Work(bytes=bytes_ * parameters, launches=20 * len(groups))
    for group in groups:
        for some in group.matrices:
            ranks = len(group.ranks)
            more = (RULE_BYTES[some.rule] - ADAMW_BYTES) * -(-some.numbers // (ranks if stage else 1))
            found += matrices.work(some, stage, ranks) + Work(bytes=more)
    return found
