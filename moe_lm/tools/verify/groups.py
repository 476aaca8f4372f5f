"""One process that adds up a token's experts as expert parallelism does: by rank, then over the ranks.

In bfloat16 the two differ from one sum over all experts: each rank's sum is rounded for its way back. At a near tie the
router of the next layer may then choose another expert, so expert parallelism in bfloat16 needs this reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.model.layers import MLP
from moe_lm.model.moe import (
    NOT_CHOSEN,
    Copies,
    Experts,
    Routing,
    add_experts,
    add_up,
    compute_dtype,
    copy_rows,
    weights_by_expert,
)


@dataclass(frozen=True)
class DispatchInGroups:
    """The dispatcher of one process whose experts form as many groups as there would be ranks."""

    groups: int

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: Experts, shared: MLP | None
    ) -> tuple[Tensor, Tensor | None]:
        x_TD = x_TD.to(compute_dtype(x_TD))
        copies = _copies(len(x_TD), self.groups, x_TD.device)
        weights_TE = weights_by_expert(routing)
        groups = torch.arange(weights_TE.shape[1], device=x_TD.device).chunk(self.groups)
        sums = []
        for own_TD, group in zip(copy_rows(x_TD, copies).chunk(self.groups), groups, strict=True):
            outside_E = torch.ones_like(weights_TE[0], dtype=torch.bool).index_fill(0, group, False)
            weights = weights_TE.masked_fill(outside_E, NOT_CHOSEN)
            sums.append(add_experts(own_TD, weights, int((weights != NOT_CHOSEN).sum()), experts))
        return add_up(torch.cat(sums), copies), None if shared is None else shared(x_TD)


def _copies(rows: int, groups: int, device: torch.device) -> Copies:
    """Every row once for every group, by group."""
    source = torch.arange(rows, device=device).repeat(groups)
    places = torch.arange(rows * groups, device=device).view(groups, rows).T.flatten()
    return Copies(source, places, torch.arange(0, rows * groups + 1, groups, device=device))
