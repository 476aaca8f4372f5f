"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): keys and values from a small latent.

Shapes: B rows, S positions, D hidden_size, H heads, C kv_lora_rank, N qk_nope_head_dim, R qk_rope_head_dim,
M v_head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.model.attention import Attend, AttentionLayer
from moe_lm.model.layers import RMSNorm
from moe_lm.model.rotary import Angles, yarn_mscale

LATENT_EPS = 1e-6  # in every DeepSeek model, whatever its rms_norm_eps


class LatentAttention(AttentionLayer):
    """Attention whose cache holds C + R numbers a position, for all heads together (equations 9 to 19).

    Training and prompts expand the latents to the keys and values of every head. A decoded token attends to the latents
    themselves: the matrices that would expand them are absorbed into its query and its output (section 2.1.2), so that
    it costs no more than multi-query attention with keys of size C + R.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index, scale=attention_scale(config))
        assert config.kv_lora_rank is not None
        assert config.qk_nope_head_dim is not None
        assert config.qk_rope_head_dim is not None
        self.heads = config.num_attention_heads
        self.latent_size = config.kv_lora_rank
        self.query_parts = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        self.expanded_parts = [config.qk_nope_head_dim, config.value_size]
        hidden, bias = config.hidden_size, config.attention_bias
        queries = self.heads * config.head_size
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent_size + config.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.latent_size, LATENT_EPS)
        self.kv_b_proj = nn.Linear(self.latent_size, self.heads * sum(self.expanded_parts), bias=False)
        self.o_proj = nn.Linear(self.heads * config.value_size, hidden, bias=config.attention_out_bias)
        self.compresses_queries = config.q_lora_rank is not None

    def forward(self, x_BSD: Tensor, angles: Angles | None, attend: Attend) -> Tensor:
        assert angles is not None  # the config refuses latent attention without rotary positions
        q_BSHN, q_BSHR = self._queries(x_BSD).unflatten(-1, (self.heads, -1)).split(self.query_parts, dim=-1)
        latent_BSC, k_BSR = self.kv_a_proj_with_mqa(x_BSD).split([self.latent_size, self.query_parts[1]], dim=-1)
        latent_BSC = self.kv_a_layernorm(latent_BSC)
        q_BSHR = self.rotate(q_BSHR, *angles, self.interleave)
        k_BS1R = self.rotate(k_BSR[..., None, :], *angles, self.interleave)
        if attend.from_cache:
            out_BSHM = self._absorbed(q_BSHN, q_BSHR, latent_BSC, k_BS1R, attend)
        else:
            out_BSHM = self._expanded(q_BSHN, q_BSHR, latent_BSC, k_BS1R, attend)
        return self.o_proj(out_BSHM.flatten(-2))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.compresses_queries:
            return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BSD)))
        return self.q_proj(x_BSD)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, attend: Attend) -> Tensor:
        k_nope, v = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split(self.expanded_parts, dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, -1, self.heads, -1)), dim=-1)
        return attend(self, q, k, v, self._kept(latent, k_rope))

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, attend: Attend) -> Tensor:
        up_k_HNC, up_v_HMC = self.kv_b_proj.weight.unflatten(0, (self.heads, -1)).split(self.expanded_parts, dim=1)
        q = torch.cat((torch.einsum("bshn,hnc->bshc", q_nope, up_k_HNC), q_rope), dim=-1)
        kept = self._kept(latent, k_rope)
        out_BSHC = attend(self, q, kept, kept[..., : self.latent_size])
        return torch.einsum("bshc,hmc->bshm", out_BSHC, up_v_HMC)

    def _kept(self, latent_BSC: Tensor, k_BS1R: Tensor) -> Tensor:
        """The entries of a cache, `[B, S, 1, C+R]`: one key for all heads, which begins with its value."""
        return torch.cat((latent_BSC[..., None, :], k_BS1R), dim=-1)


def attention_scale(config: ModelConfig) -> float:
    """The scale of the products of queries and keys, with YaRN's temperature where `mscale_all_dim` is set (DeepSeek).

    The factor on cosine and sine (rotary.py) acts only on the rotated entries, and is 1 where both are equal.
    """
    scale, scaling = config.head_size**-0.5, config.rope_scaling
    if scaling is not None and scaling.mscale_all_dim:
        scale *= yarn_mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale
