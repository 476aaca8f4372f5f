"""A forward pass that keeps every attention weight and the decision of every router.

Shapes: S tokens, H query heads, K key-value heads, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moe_lm.model.attention import AttentionLayer
from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel


@dataclass(frozen=True)
class RecordingAttention:
    """Causal attention of one row, written out to keep its weights: `weights[layer]` is `[H, S, S]`, a row per query.

    Training and generation run the same layers with other kernels.
    """

    weights: dict[int, Tensor] = field(default_factory=dict)
    from_cache: ClassVar[bool] = False

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        sharing = q.shape[2] // k.shape[2]
        k, v = k[0].repeat_interleave(sharing, dim=1), v[0].repeat_interleave(sharing, dim=1)
        scores_HSS = torch.einsum("qhn,khn->hqk", q[0], k).float() * layer.scale
        later = torch.ones(scores_HSS.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights_HSS = scores_HSS.masked_fill(later, -torch.inf).softmax(-1)
        self.weights[layer.index] = weights_HSS.cpu()
        return torch.einsum("hqk,khm->qhm", weights_HSS.to(v.dtype), v)[None]


@dataclass(frozen=True)
class Recording:
    """`attention[layer]` is `[H, S, S]`; `routings[layer]` is the decision of the router, in layers with experts."""

    ids: list[int]
    logits: Tensor  # [S, V]
    attention: dict[int, Tensor]
    routings: dict[int, Routing]


@torch.inference_mode()
def record(model: LanguageModel, ids: list[int]) -> Recording:
    """Run a model over at most `max_position_embeddings` ids."""
    device = model.device
    attend = RecordingAttention()
    positions = torch.arange(len(ids), device=device)
    logits_1SV, routings = model(torch.tensor([ids], device=device), positions[None], attend)
    here = [Routing(*(part.cpu() for part in routing)) for routing in routings]
    return Recording(ids, logits_1SV[0].cpu(), attend.weights, dict(zip(model.config.moe_layers, here, strict=True)))


def shares(routing: Routing, experts: int) -> Tensor:
    """The share of each expert in the routed output of a token, `[S, E]`; 0 for experts that were not chosen."""
    weights_Sk = routing.weights / routing.weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return torch.zeros(len(weights_Sk), experts).scatter_(-1, routing.experts, weights_Sk.float())
