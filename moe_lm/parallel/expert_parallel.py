"""Expert parallelism, applied from outside: the ranks of a group share one copy of the experts; tokens travel to them.

Shapes as in model/moe.py: T tokens of this rank, k experts a token, R = T*k slots; Q slots that arrive from all ranks
of the expert-parallel group, L experts of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_lm.common.errors import UsageError
from moe_lm.model.moe import Experts, Gather, Routing, SortedSlots, sorting
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.topology import Topology

DATA, EXPERT = "data", "expert"  # the mesh's dimensions


def check_groups(size: int, topology: Topology) -> None:
    """Raise UsageError when the processes cannot be divided into groups of `size`."""
    if topology.world_size % size:
        raise UsageError(
            f"parallel.expert_parallel_size={size} does not divide the {topology.world_size} processes of this run; "
            "choose a divisor, or start a multiple",
            common=True,
        )


def apply(model: LanguageModel, mesh: DeviceMesh, exchange: Exchange | None) -> int:
    """Keep only this rank's experts of a model, whatever its device, and let tokens travel between the ranks.

    `mesh` has the dimensions DATA and EXPERT. Returns the global index of this rank's first expert.
    """
    group, first = mesh.get_group(EXPERT), 0
    for layer in model.moe_layers:
        local = model.config.n_routed_experts // dist.get_world_size(group)
        first = mesh.get_local_rank(EXPERT) * local
        layer.experts.indices = range(first, first + local)
        for name, stack in list(layer.experts.named_parameters()):
            kept = stack.detach()[first : first + local].clone()
            setattr(layer.experts, name, nn.Parameter(kept, requires_grad=stack.requires_grad))
        if exchange is not None and dist.get_world_size(group) > 1:
            layer.dispatcher = AllToAllDispatcher(group, exchange)
    return first


class AllToAllDispatcher:
    """Dropless dispatch and combine with uneven splits: the counts travel first, then exactly that many tokens."""

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.group = group
        self.exchange = exchange

    @torch.compiler.disable
    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, meanwhile: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        slots = SortedSlots(routing)
        ranks = dist.get_world_size(self.group)
        counts_NL = slots.counts_E.unflatten(0, (ranks, -1))  # to each rank, for each of its experts
        arriving_NL = torch.empty_like(counts_NL)
        with self.exchange.waiting():
            dist.all_to_all_single(arriving_NL, counts_NL, group=self.group)
            sent, received = torch.stack((counts_NL.sum(1), arriving_NL.sum(1))).tolist()

        journey = Journey(self.group, sent, received)
        on_the_way = _Depart.apply(slots.gather(x_TD), journey)
        alongside = meanwhile()
        # They arrive sorted by rank and then by expert; the grouped products need them by expert.
        local = arriving_NL.shape[1]
        expert_Q = torch.arange(local, device=x_TD.device).repeat(ranks).repeat_interleave(arriving_NL.flatten())
        order_Q, place_Q = sorting(expert_Q)
        with self.exchange.waiting():
            arrived_QD = _Arrive.apply(on_the_way, journey)
            with_them = Journey(self.group, sent, received)
            weights_Q = _Arrive.apply(_Depart.apply(slots.weights_R, with_them), with_them)
        arrived_QD, weights_Q = (Gather.apply(rows, order_Q, place_Q, 1) for rows in (arrived_QD, weights_Q))
        out_QD = experts(arrived_QD, arriving_NL.sum(0).cumsum(0).to(torch.int32), weights_Q)

        way_back = Journey(self.group, received, sent)
        out_QD = Gather.apply(out_QD, place_Q, order_Q, 1)
        with self.exchange.waiting():
            out_RD = _Arrive.apply(_Depart.apply(out_QD, way_back), way_back)
        return slots.combine(out_RD), alongside


@dataclass
class Journey:
    """One exchange of rows between the ranks of a group: how many go to and come from each."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    under_way: tuple[dist.Work, Tensor, Tensor] | None = None  # the rows that leave must outlive the exchange

    def start(self, rows: Tensor, back: bool = False) -> Tensor:
        """Start the exchange; the returned tensor of arriving rows is filled when `finish` returns."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        rows = rows.contiguous()
        coming = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(coming, rows, received, sent, group=self.group, async_op=True)
        self.under_way = (work, rows, coming)
        return coming

    def finish(self) -> Tensor:
        assert self.under_way is not None
        work, _, coming = self.under_way
        work.wait()
        self.under_way = None
        return coming


class _Depart(torch.autograd.Function):
    """Start an exchange; in the backward pass, wait for its reverse."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        return journey.start(rows)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.journey.finish(), None


class _Arrive(torch.autograd.Function):
    """Wait for an exchange; in the backward pass, start its reverse.

    Between the two, in both passes, the rest of the graph (the shared experts) is computed.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, journey: Journey) -> Tensor:
        ctx.journey = journey
        journey.finish()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.journey.start(grad, back=True)
        return grad, None  # only its shape matters: _Depart has the arriving rows
