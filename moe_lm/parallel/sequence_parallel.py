"""Sequence parallelism, applied from outside: the ranks of a group share the rows of a batch.

DeepSpeed-Ulysses (arXiv 2309.14509): each rank has as many consecutive positions of every row. Whatever is computed
position by position stays there. Attention is divided by heads instead: one all-to-all before it brings the whole rows
of some heads to each rank, and one behind it brings the results of all heads back to their positions.

Shapes: P ranks of the group, B rows, S positions of a whole row and S/P of this rank's, H query heads, K key-value
heads, N head size, M head size of the values, W numbers of a position that one rank sends to another.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.model.attention import AttentionLayer, PackedAttention
from moe_lm.parallel.exchange import Exchange


class SequenceGroup:
    """The ranks that share this rank's rows, and what they exchange.

    Its exchanges can be part of a compiled graph: they have the same sizes on all ranks, and the host waits for none.
    """

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.name, self.size, self.exchange = group.group_name, dist.get_world_size(group), exchange

    def attention(self, cu_seqlens: Tensor, positions: int) -> SequenceAttention:
        """Attention in segments of the whole rows, of which each rank has so many `positions`."""
        return SequenceAttention(self, PackedAttention(cu_seqlens, positions * self.size))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, which has no gradient."""
        operators = torch.ops._c10d_functional
        with torch.no_grad(), self.waiting():
            summed: Tensor = operators.wait_tensor(operators.all_reduce(tensor, "sum", self.name))
        return summed

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """From all heads `[B, S/P, H or K, N or M]` of this rank's positions to its heads `[B, S, H/P ..., N or M]`.

        Where P does not divide K, each key-value head is repeated as often as it takes: the heads that are needed by
        several ranks travel to each of them.
        """
        heads = math.lcm(k.shape[2], self.size)
        if heads > k.shape[2]:
            k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
        parts = [x.unflatten(2, (self.size, -1)).movedim(2, 0) for x in (q, k, v)]
        sent_PBSW = torch.cat([part.flatten(3) for part in parts], -1)
        whole_BSW = _AllToAll.apply(sent_PBSW, self).movedim(0, 1).flatten(1, 2)
        widths = [part.shape[3] * part.shape[4] for part in parts]
        of_each = zip(whole_BSW.split(widths, -1), parts, strict=True)
        return [own.unflatten(-1, part.shape[3:]) for own, part in of_each]

    def to_positions(self, out: Tensor) -> Tensor:
        """From this rank's heads `[B, S, H/P, M]` to all heads of its positions `[B, S/P, H, M]`."""
        sent_PBSW = out.flatten(2).unflatten(1, (self.size, -1)).movedim(1, 0)
        arrived_BSPW = _AllToAll.apply(sent_PBSW, self).movedim(0, 2)
        return arrived_BSPW.unflatten(-1, out.shape[2:]).flatten(2, 3)

    def waiting(self) -> AbstractContextManager[None]:
        """Around an exchange. A compiled graph cannot tell when it waits."""
        return nullcontext() if torch.compiler.is_compiling() else self.exchange.waiting()


@dataclass(frozen=True)
class SequenceAttention:
    """Causal attention of this rank's positions within segments of whole rows, as `PackedAttention` over all ranks."""

    group: SequenceGroup
    within: PackedAttention
    from_cache: ClassVar[bool] = False

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        q, k, v = self.group.to_heads(q, k, v)
        return self.group.to_positions(self.within(layer, q, k, v))


class _AllToAll(torch.autograd.Function):
    """Block j of rank i becomes block i of rank j. Its gradients travel in the same way."""

    @staticmethod
    def forward(ctx: Any, blocks_PBSW: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return _exchanged(blocks_PBSW, group)

    @staticmethod
    def backward(ctx: Any, gradient_PBSW: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient_PBSW, ctx.group), None


def _exchanged(blocks_PBSW: Tensor, group: SequenceGroup) -> Tensor:
    operators, splits = torch.ops._c10d_functional, [1] * group.size
    with group.waiting():
        sent = operators.all_to_all_single(blocks_PBSW.contiguous(), splits, splits, group.name)
        arrived: Tensor = operators.wait_tensor(sent)
    return arrived
