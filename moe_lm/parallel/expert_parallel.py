"""Expert parallelism, applied from outside: the ranks of a group share one copy of the experts; tokens travel to them.

Shapes as in model/moe.py: T tokens of this rank, D hidden_size; N ranks in the expert-parallel group, L experts on
each; P rows that this rank sends, A rows that arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_lm.model.layers import MLP, compute_dtype
from moe_lm.model.moe import (
    NOT_CHOSEN,
    Copies,
    Experts,
    Routing,
    add_experts,
    add_up,
    copies_of,
    weights_by_expert,
)
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.journey import Journey

DATA, EXPERT = "data", "expert"  # the mesh's dimensions


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


class Splits(NamedTuple):
    """How many rows this rank exchanges with each rank of its group, and what it has to do with those that arrive."""

    sent: list[int]  # rows to each rank: a token goes once to a rank, however many of its experts are there
    received: list[int]  # rows from each rank
    choices: int  # of this rank's experts, for the rows that arrive


ReadCounts = Callable[[], Tensor]  # [2, N, 2] int64 on the host: to and from each rank, rows and choices of experts


class AllToAllDispatcher:
    """Dropless dispatch and combine with uneven splits, over `torch.distributed`.

    A token is sent once to each rank that has experts for it, with their weights. Their results are added up there
    before the way back. The shared experts' first products are computed while tokens travel there, the last one while
    results travel back, and so it is with their gradients.

    Another transport, such as DeepEP's kernels, is another dispatcher. It brings rows and `weights_by_expert` to the
    experts' ranks, calls `add_experts` there, and adds up what comes back; it is differentiable in `x` and the weights.
    """

    def __init__(self, group: dist.ProcessGroup, exchange: Exchange) -> None:
        self.group, self.exchange = group, exchange
        self.ranks = dist.get_world_size(group)

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, shared: MLP | None
    ) -> tuple[Tensor, Tensor | None]:
        x_TD = x_TD.to(compute_dtype(x_TD))
        weights_TNL = weights_by_expert(routing).unflatten(1, (self.ranks, -1))
        chosen_TNL = weights_TNL != NOT_CHOSEN
        asked_TN = chosen_TNL.any(-1)
        copies = copies_for_ranks(asked_TN)
        read_counts = self.exchange_counts(torch.stack((asked_TN.sum(0), chosen_TNL.sum((0, 2))), 1))
        there, back = Journey(self.group, self.exchange), Journey(self.group, self.exchange)

        departed = there.depart(x_TD, weights_TNL.transpose(0, 1).flatten(0, 1))
        wide = () if shared is None else shared.expand(x_TD)
        splits = self.splits(read_counts)
        there.start(splits.sent, splits.received, copies)
        arrived_AD, weights_AL = there.arrive(departed)

        out_AD = add_experts(arrived_AD, weights_AL, splits.choices, experts)

        departed = back.depart(out_AD)
        back.start(splits.received, splits.sent)
        shared_TD = None if shared is None else shared.contract(*wide)
        (out_PD,) = back.arrive(departed)
        return add_up(out_PD, there.copies[0]), shared_TD

    @torch.compiler.disable
    def exchange_counts(self, counts_N2: Tensor) -> ReadCounts:
        """Tell each rank how many rows it will get from this one, and how many choices of its experts they carry."""
        both_2N2 = torch.stack((counts_N2, counts_N2))
        work = dist.all_to_all_single(both_2N2[1], both_2N2[0], group=self.group, async_op=True)
        return self.exchange.fetch(both_2N2, work)

    @torch.compiler.disable
    def splits(self, read_counts: ReadCounts) -> Splits:
        """The splits of this layer and pass: the one place in which the host waits for the device.

        A simulated rank answers here: `sent` and `received` have an entry for each rank of the group, each at most the
        number of the sender's tokens; `choices` are at least the rows that arrive, at most `k` times as many.
        """
        with self.exchange.waiting():
            (sent, _), (received, choices) = read_counts().mT.tolist()
        return Splits(sent, received, sum(choices))


def copies_for_ranks(asked_TN: Tensor) -> tuple[Copies, Copies]:
    """The copies of tokens for the ranks that are asked, and those of the pairs of rank and token.

    There are N*T such pairs, by rank; each is copied once or not at all. How many are is not known yet: there is room
    for all, and only the `first` ones are copies.
    """
    copies, pair_P, before = copies_of(asked_TN, asked_TN.numel())
    return copies, Copies(pair_P, torch.arange(asked_TN.numel(), device=pair_P.device), before)
