"""Balance terms: losses that spread tokens over the experts; the experts' load and the routers' entropy.

Shapes: B rows, S positions, T = B*S tokens, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lm.config.training import BalanceConfig
from moe_lm.model.moe import Routing, expert_counts


def balance_loss(
    routings: Sequence[Routing], counted_BS: Tensor, weights: BalanceConfig, load: Tensor | None, tokens: int, rows: int
) -> Tensor:
    """The weighted balance terms of this part of the global batch, summed over the layers.

    `tokens` and `rows` are those of the whole global batch, `load [layers, E]` that of the step before,
    None for an even one.
    """
    counted_T = counted_BS.flatten().float()
    total = counted_T.new_zeros(())
    if weights.sequence_loss:
        terms = [sequence_balance_loss(routing, counted_BS) for routing in routings]
        total = total + weights.sequence_loss * sum(terms) / rows
    if weights.batch_loss and routings:
        load = torch.stack([r.scores.new_zeros(r.scores.shape[1]) for r in routings]) if load is None else load
        terms = [batch_balance_loss(r, counted_T, load_E) for r, load_E in zip(routings, load, strict=True)]
        total = total + weights.batch_loss * sum(terms) / tokens
    if weights.z_loss:
        terms = [router_z_loss(routing, counted_T) for routing in routings]
        total = total + weights.z_loss * sum(terms) / tokens
    return total


def sequence_balance_loss(routing: Routing, counted_BS: Tensor) -> Tensor:
    """DeepSeek-V3's sequence-wise loss without its factor (equations 17 to 20), summed over the rows.

    Scores are normalised over the experts; positions that are not counted (padding) take no part.
    """
    rows, positions = counted_BS.shape
    experts = routing.scores.shape[1]
    per_token = routing.experts.shape[1]
    counted = counted_BS[..., None].float()
    tokens_B = counted.sum(1).clamp(min=1)
    shares_BSE = (routing.scores / routing.scores.sum(-1, keepdim=True)).unflatten(0, (rows, positions))
    probability_BE = (shares_BSE * counted).sum(1) / tokens_B
    # Equation 18 takes the best scores as they are, without the bias and the groups that decide in `route`.
    best_BSk = routing.scores.topk(per_token, dim=-1).indices.unflatten(0, (rows, positions))
    fraction_BE = torch.zeros(rows, experts, device=counted.device).scatter_add(
        1, best_BSk.flatten(1), counted.expand(-1, -1, per_token).flatten(1)
    )
    fraction_BE = fraction_BE * experts / (per_token * tokens_B)
    return (fraction_BE * probability_BE).sum()


def batch_balance_loss(routing: Routing, counted_T: Tensor, load_E: Tensor) -> Tensor:
    """The classical auxiliary loss `E * sum_e f_e * P_e` (Switch, equation 4), summed over this part of the batch.

    P is summed over the counted tokens, to be divided by their global number. f is the share of `load [E]`, the counts
    of a whole global batch: that of the step before, known before the first micro-batch in every layout. Without a load
    it is even, and the loss has no gradient.
    """
    experts, total = routing.scores.shape[1], load_E.sum()
    fraction_E = torch.where(total > 0, load_E.float() / total.clamp(min=1), 1 / experts)
    shares_TE = routing.scores / routing.scores.sum(-1, keepdim=True)
    return experts * (fraction_E * (shares_TE * counted_T[:, None]).sum(0)).sum()


def router_z_loss(routing: Routing, counted_T: Tensor) -> Tensor:
    """ST-MoE's z-loss (arXiv 2202.08906, equation 5), summed over the counted tokens."""
    return (routing.logits.logsumexp(-1).square() * counted_T).sum()


def expert_load(routings: Sequence[Routing], counted_BS: Tensor) -> Tensor:
    """Tokens per expert in every MoE layer, `[layers, E]` int64; positions that are not counted are left out."""
    if not routings:
        return torch.zeros(0, 0, dtype=torch.int64, device=counted_BS.device)
    counted_T = counted_BS.flatten()
    return torch.stack([expert_counts(r.experts, r.scores.shape[1], counted_T) for r in routings])


@torch.no_grad()
def router_entropies(routings: Sequence[Routing], device: torch.device) -> Tensor:
    """Entropy of every MoE layer's router, `[layers]`."""
    return torch.stack([router_entropy(r) for r in routings]) if routings else torch.zeros(0, device=device)


def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy, in nats, of the router's scores normalised over the experts."""
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).mean()
