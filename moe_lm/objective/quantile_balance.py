"""Quantile balancing: every expert's bias is set so that its share of the last step's tokens would have chosen it.

A balance without a loss and without a rate: Kimi K3's technical report, section 2.3.3, equations 13 and 14, and
appendix D; before it kexue.fm/archives/11619 and, in Megatron-LM, pull requests 5349 and 6637 (over the global batch).

Token t chooses expert j if `s_tj + b_j` is above the best biased score that it does not choose, `alpha_t`, that is, if
`b_j` is above `r_tj = alpha_t - s_tj`. With the `k / E` quantile of `r_tj` over the tokens for a bias, `k / E` of the
tokens choose expert j, as far as the other biases stay as they are.

The quantile comes from counts in bins, which are integers and add up over micro-batches and ranks: every layout has the
same biases. It is an edge of a bin, not interpolated, so that rounding hardly ever changes it. Bins are of equal width
in the signed square root of `r`: as fine as 8e-6 near zero, where the scores of a softmax over many experts lie, and
8e-3 at the ends.

Groups of experts are left out of account, which makes the balance of a group-limited router coarser.

Shapes: L MoE layers, T tokens, E n_routed_experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel

BINS = 1000
REACH = 2.0  # biases further from each other decide against any scores, which are within 0 and 1


@torch.no_grad()
def needed_biases(routing: Routing, biases_LE: Tensor, counted_T: Tensor) -> Tensor:
    """How many tokens need which bias to choose each expert: counts `[L, E, BINS]` int32 of `r`, without padding."""
    layers, _, experts = routing.scores.shape
    best = min(routing.experts.shape[-1] + 1, experts)
    counts = torch.zeros(layers, experts * BINS, dtype=torch.int32, device=biases_LE.device)
    first_E = BINS * torch.arange(experts, device=biases_LE.device)
    weight_TE = counted_T[:, None].int().expand(-1, experts).flatten()
    for counts_N, scores_TE, bias_E in zip(counts, routing.scores, biases_LE, strict=True):
        alpha_T1 = (scores_TE + bias_E).topk(best, dim=-1).values[:, -1:]
        counts_N.scatter_add_(0, (first_E + _bins(alpha_T1 - scores_TE)).flatten(), weight_TE)
    return counts.view(layers, experts, BINS)


@torch.no_grad()
def set_biases(model: LanguageModel, counts: Tensor, memory: float = 0.0) -> None:
    """Set the routers' biases from the counts of the whole global batch; `memory` is the share of the old ones kept.

    The mean over the experts, which decides nothing, is taken out.
    """
    below_LEN = counts.cumsum(-1)  # int64
    tokens_L11 = below_LEN[:, :1, -1:]
    missing = below_LEN * counts.shape[1] < tokens_L11 * model.config.num_experts_per_tok
    quantile_LE = _upper_edges(counts.device)[missing.sum(-1).clamp(max=BINS - 1)]
    kept_L = torch.where(tokens_L11.flatten() == 0, 1.0, memory)  # padding alone says nothing of the balance
    for layer, quantile_E, kept in zip(model.moe_layers, quantile_LE, kept_L, strict=True):
        bias_E = layer.gate.e_score_correction_bias
        bias_E.copy_(torch.lerp(quantile_E - quantile_E.mean(), bias_E, kept))


def _bins(needed: Tensor) -> Tensor:
    root = needed.sign() * (needed.abs() / REACH).sqrt()
    return ((root + 1) * (BINS / 2)).long().clamp(0, BINS - 1)


def _upper_edges(device: torch.device) -> Tensor:
    root = torch.arange(1, BINS + 1, device=device) * (2 / BINS) - 1
    return REACH * root * root.abs()
