"""Balance terms: losses that spread tokens over the experts; the experts' load and the routers' entropy.

All layers are computed together: what takes one layer's routing takes that of L layers with a dimension more in front.

Shapes: L MoE layers, B rows, S positions, T = B*S tokens, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.config.training import BalanceConfig
from moe_lm.model.moe import Routing, expert_counts

OverRow = Callable[[Tensor], Tensor]  # the sum over the ranks that share rows, without a gradient


def whole(counts: Tensor) -> Tensor:
    """The sum over a row that one rank has alone."""
    return counts


class RoutingFigures(NamedTuple):
    """What a micro-batch's routers did, and the balance terms that are on, without their factors. Only they have
    gradients."""

    load: Tensor  # [L, E] int64, padding left out
    entropy: Tensor  # [L], in nats, mean over the tokens
    terms: dict[str, Tensor]  # by their names in BalanceConfig


def of_all_layers(routings: Sequence[Routing]) -> Routing:
    """The routings of L layers as one."""
    return Routing(*(torch.stack(tensors) for tensors in zip(*routings, strict=True)))


def routing_figures(
    routing: Routing,
    counted_BS: Tensor,
    weights: BalanceConfig,
    load: Tensor | None,
    over_row: OverRow = whole,
) -> RoutingFigures:
    """Measure the routing of all layers. `load [L, E]` is that of the step before, None for an even one.

    In a graph of its own it takes a tenth of the kernels. So the batch's counts, which change, are not its business.
    """
    counted_T = counted_BS.flatten().float()
    terms = {}
    if weights.sequence_loss:
        terms["sequence_loss"] = sequence_balance_loss(routing, counted_BS, over_row)
    if weights.batch_loss:
        load = routing.scores.new_zeros(routing.scores[..., 0, :].shape) if load is None else load
        terms["batch_loss"] = batch_balance_loss(routing, counted_T, load)
    if weights.z_loss:
        terms["z_loss"] = router_z_loss(routing, counted_T)
    return RoutingFigures(expert_load(routing, counted_BS), router_entropy(routing), terms)


def balance_loss(terms: Mapping[str, Tensor], weights: BalanceConfig, tokens: int, rows: int) -> Tensor | float:
    """The weighted balance terms of this part of the global batch, which has `tokens` and `rows` in all."""
    units = {"sequence_loss": rows, "batch_loss": tokens, "z_loss": tokens}
    return sum(getattr(weights, name) * term / units[name] for name, term in terms.items())


def sequence_balance_loss(routing: Routing, counted_BS: Tensor, over_row: OverRow = whole) -> Tensor:
    """DeepSeek-V3's sequence-wise loss without its factor (equations 17 to 20), summed over the rows.

    Scores are normalised over the experts; positions that are not counted (padding) take no part. The fractions f need
    the counts of whole rows. The loss is linear in the probabilities P: a part of a row adds its own part of them.
    """
    rows_and_positions = counted_BS.shape
    experts = routing.scores.shape[-1]
    per_token = routing.experts.shape[-1]
    counted = counted_BS[..., None].float()
    shares_BSE = (routing.scores / routing.scores.sum(-1, keepdim=True)).unflatten(-2, rows_and_positions)
    probability_BE = (shares_BSE * counted).sum(-2)
    # Equation 18 takes the best scores as they are, without the bias and the groups that decide in `route`.
    best_BSk = routing.scores.topk(per_token, dim=-1).indices.unflatten(-2, rows_and_positions)
    counts_BE = over_row(
        torch.zeros_like(probability_BE).scatter_add(-1, best_BSk.flatten(-2), counted.expand_as(best_BSk).flatten(-2))
    )
    tokens_B = (counts_BE.sum(-1, keepdim=True) / per_token).clamp(min=1)
    fraction_BE = counts_BE * experts / (per_token * tokens_B)
    return (fraction_BE * (probability_BE / tokens_B)).sum()


def batch_balance_loss(routing: Routing, counted_T: Tensor, load_E: Tensor) -> Tensor:
    """The classical auxiliary loss `E * sum_e f_e * P_e` (Switch, equation 4), summed over this part of the batch.

    P is summed over the counted tokens, to be divided by their global number. f is the share of `load [E]`, the counts
    of a whole global batch: that of the step before, known before the first micro-batch in every layout. Without a load
    it is even, and the loss has no gradient.
    """
    experts, total = routing.scores.shape[-1], load_E.sum(-1, keepdim=True)
    fraction_E = torch.where(total > 0, load_E.float() / total.clamp(min=1), 1 / experts)
    shares_TE = routing.scores / routing.scores.sum(-1, keepdim=True)
    return experts * (fraction_E * (shares_TE * counted_T[:, None]).sum(-2)).sum()


def router_z_loss(routing: Routing, counted_T: Tensor) -> Tensor:
    """ST-MoE's z-loss (arXiv 2202.08906, equation 5), summed over the counted tokens."""
    return (routing.logits.logsumexp(-1).square() * counted_T).sum()


def expert_load(routing: Routing, counted_BS: Tensor) -> Tensor:
    """Tokens per expert, `[L, E]` int64; positions that are not counted are left out."""
    return expert_counts(routing.experts, routing.scores.shape[-1], counted_BS.flatten())


@torch.no_grad()
def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy, in nats, of the router's scores normalised over the experts."""
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).mean(-1)
