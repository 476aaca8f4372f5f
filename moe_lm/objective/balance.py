"""Balance terms of a routing: losses that spread tokens over the experts, and the router's entropy.

Shapes: T = B*S tokens, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lm.model.moe import Routing


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

    `load [E]` are the counts of the whole global batch, so f means the same in every layout; P is summed over the
    counted tokens, to be divided by their global number.
    """
    experts = routing.scores.shape[1]
    fraction_E = load_E.float() / load_E.sum().clamp(min=1)
    shares_TE = routing.scores / routing.scores.sum(-1, keepdim=True)
    return experts * (fraction_E * (shares_TE * counted_T[:, None]).sum(0)).sum()


def router_z_loss(routing: Routing, counted_T: Tensor) -> Tensor:
    """ST-MoE's z-loss (arXiv 2202.08906, equation 5), summed over the counted tokens."""
    return (routing.logits.logsumexp(-1).square() * counted_T).sum()


def router_entropy(routing: Routing) -> Tensor:
    """Mean entropy, in nats, of the router's scores normalised over the experts."""
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    return -(shares * shares.clamp(min=1e-20).log()).sum(-1).mean()
