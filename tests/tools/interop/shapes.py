"""Small models of the kinds that families of Hugging Face hold, as settings of ours."""

from __future__ import annotations

from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip
MOE = {"n_routed_experts": 8, "moe_intermediate_size": 16}
SOFTMAX = MOE | {"scoring_func": "softmax", "n_shared_experts": 0}
LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "use_qk_norm": False,
}  # fmt: skip

# The settings, beside SHAPE, of a model that a family holds.
HELD: dict[str, dict[str, Any]] = {
    "dots1": MOE,
    "glm4_moe": MOE | {"use_qk_norm": False},
    "deepseek_v3": MOE | LATENT,
    "deepseek_v2": MOE | LATENT | {"scoring_func": "softmax", "norm_topk_prob": False, "rope_interleave": True},
    "qwen3_moe": SOFTMAX,
    "qwen2_moe": SOFTMAX | {"use_qk_norm": False, "n_shared_experts": 1, "shared_expert_gate": True},
    "mixtral": SOFTMAX | {"use_qk_norm": False},
    "olmoe": SOFTMAX | {"qk_norm_over": "projection"},
    "glm4_moe_lite": MOE | LATENT | {"mlp_only_layers": (1,)},
    "solar_open": MOE | {"use_qk_norm": False},
    "minimax_m2": MOE | {"n_shared_experts": 0, "qk_norm_over": "projection"},
    "ernie4_5_moe": MOE | {"scoring_func": "softmax", "use_qk_norm": False, "rope_interleave": True},
    "qwen3": {},
    "qwen2": {"use_qk_norm": False, "attention_bias": True},
    "llama": {"use_qk_norm": False},
    "mistral": {"use_qk_norm": False},
    "seed_oss": {"use_qk_norm": False, "attention_bias": True, "mlp_bias": True},
    "youtu": LATENT,
}
NEVER_NEAREST = ("solar_open", "mistral")  # all that they hold an earlier family holds too
