"""Norms, feed-forward layers and fixed positions.

Shapes: B rows, S positions, D hidden_size, F width of a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467, equation 4) over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


def build_norm(config: ModelConfig) -> nn.Module:
    """The norm of the residual stream that `config` asks for."""
    if config.norm_type == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    return RMSNorm(config.hidden_size, config.rms_norm_eps)


class MLP(nn.Module):
    """Feed-forward: `down(act(gate(x)) * up(x))` when gated (SwiGLU, arXiv 2002.05202), else `down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        bias = config.mlp_bias
        if config.mlp_gated:
            self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.gated = config.mlp_gated
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.contract(*self.expand(x_BSD))

    def expand(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """The products to the layer's width: gate and up `[B, S, F]`, or up alone."""
        up = self.up_proj(x_BSD)
        return (self.gate_proj(x_BSD), up) if self.gated else (up,)

    def contract(self, first: Tensor, up: Tensor | None = None) -> Tensor:
        """The way back from what `expand` gives: the activation and the last product."""
        hidden = self.activation(first)
        return self.down_proj(hidden if up is None else hidden * up)


def sinusoidal_positions(position_ids: Tensor, size: int) -> Tensor:
    """Fixed position vectors `[B, S, D]` (arXiv 1706.03762, section 3.5): sine on even, cosine on odd entries."""
    exponents = torch.arange(0, size, 2, device=position_ids.device, dtype=torch.float32) / size
    angles = position_ids[..., None].float() / 10000.0**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)
