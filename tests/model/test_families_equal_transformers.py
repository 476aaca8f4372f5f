"""Each family of public models that `ModelConfig` can express, against `transformers` with copied weights, float32.

`FAMILIES` also says how: what a family's own config calls something is on the left, what ours calls it on the right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import transformers
from transformers import PreTrainedModel

from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel
from tests.model.transformers_models import (
    VOCABULARY,
    assert_same_logits_experts_and_gradients,
    build,
    in_our_layout,
    our_model,
    random_tokens,
)

TOKENS = 512
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": TOKENS, "rms_norm_eps": 1e-5,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts_per_tok": 3}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model of `transformers`: keys that are the same in both configs, theirs, ours, and their variants."""

    name: str
    both: dict[str, Any]
    theirs: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)

    def build(self, **rope: Any) -> tuple[LanguageModel, PreTrainedModel]:
        """Our model and theirs, with the same random weights; `rope` are their rope_parameters besides the base."""
        values = {**SHAPE, **self.both}
        parameters = {"rope_type": "default", "rope_theta": 500.0, **rope}
        theirs_config = getattr(transformers, f"{self.name}Config")(
            **{**values, **self.theirs}, rope_parameters=parameters
        )
        theirs = build(getattr(transformers, f"{self.name}ForCausalLM"), theirs_config)
        scaling = {"rope_scaling": rope} if "rope_type" in rope else {}
        config = ModelConfig(**{**values, "rope_theta": 500.0, **self.ours, **scaling})
        return our_model(config, in_our_layout(theirs.state_dict())), theirs


SOFTMAX = {"n_routed_experts": 8, "n_shared_experts": 0, "scoring_func": "softmax"}
PLAIN = {"n_routed_experts": 0, "use_qk_norm": False}
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
LATENT = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", {}, ours=PLAIN),
    "llama with biases, tied": Family(
        "Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
        ours={**PLAIN, "attention_out_bias": True},
    ),
    "qwen2": Family("Qwen2", {}, ours={**PLAIN, "attention_bias": True}),
    "qwen3": Family("Qwen3", {"head_dim": 8}),
    "mixtral": Family(
        "Mixtral", {"num_experts_per_tok": 3}, {"num_local_experts": 8}, {**SOFTMAX, "use_qk_norm": False}
    ),
    "olmoe": Family(
        "Olmoe", {"num_experts_per_tok": 3, "norm_topk_prob": False},
        {"num_experts": 8, "pad_token_id": None},  # there a padding token's embedding gets no gradient
        {**SOFTMAX, "qk_norm_over": "projection"},
    ),
    "qwen2_moe": Family(
        "Qwen2Moe", {**EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 40}, {"num_experts": 8},
        {
            **SOFTMAX, "n_shared_experts": 1, "shared_expert_gate": True, "use_qk_norm": False, "attention_bias": True,
        },
    ),
    "qwen2_moe, some layers dense": Family(
        "Qwen2Moe",
        {**EXPERTS, "norm_topk_prob": True, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4},
        {"num_experts": 8, "decoder_sparse_step": 2, "mlp_only_layers": [1], "qkv_bias": False},
        {
            **SOFTMAX, "n_shared_experts": 1, "shared_expert_gate": True, "use_qk_norm": False,
            "mlp_only_layers": [0, 1, 2],
        },
    ),
    "qwen3_moe": Family(
        "Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "head_dim": 8, "mlp_only_layers": [0]}, {"num_experts": 8},
        SOFTMAX,
    ),
    "dots1": Family(
        "Dots1", {**EXPERTS, **GROUPS, "n_shared_experts": 2, "first_k_dense_replace": 1}, {"sliding_window": None}
    ),
    "glm4_moe": Family(
        "Glm4Moe", {**EXPERTS, **GROUPS, "first_k_dense_replace": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5}
    ),
    "glm4_moe without norms": Family(
        "Glm4Moe",
        {
            **EXPERTS, "n_routed_experts": 8, "first_k_dense_replace": 0, "use_qk_norm": False, "attention_bias": True,
            "norm_topk_prob": True, "partial_rotary_factor": 0.25, "head_dim": 16,
        },
    ),
    "deepseek_v2": Family(
        "DeepseekV2", {**EXPERTS, **LATENT, "first_k_dense_replace": 1, "n_shared_experts": 2}, {"n_routed_experts": 8},
        {**SOFTMAX, "n_shared_experts": 2, "norm_topk_prob": False, "use_qk_norm": False, "rope_interleave": True},
    ),
    "deepseek_v2 with groups": Family(
        "DeepseekV2", {**EXPERTS, **LATENT, **GROUPS, "q_lora_rank": 24, "n_shared_experts": 1, "attention_bias": True},
        {"topk_method": "group_limited_greedy"},
        {
            "norm_topk_prob": False, "scoring_func": "softmax", "use_qk_norm": False, "rope_interleave": True,
            "attention_out_bias": True,
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3",
        {
            **EXPERTS, **LATENT, **GROUPS, "q_lora_rank": 24, "first_k_dense_replace": 1, "n_shared_experts": 1,
            "rope_interleave": True,
        },
        ours={"use_qk_norm": False},
    ),
    "deepseek_v3, wide values, halves, biases": Family(
        "DeepseekV3",
        {
            **EXPERTS, **LATENT, "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "v_head_dim": 32,
            "first_k_dense_replace": 0, "n_shared_experts": 2, "rope_interleave": False, "attention_bias": True,
            "routed_scaling_factor": 1.0, "tie_word_embeddings": True,
        },
        ours={"use_qk_norm": False, "attention_out_bias": True},
    ),
    "glm4_moe_lite": Family(
        "Glm4MoeLite",
        {**EXPERTS, **LATENT, **GROUPS, "q_lora_rank": 24, "n_shared_experts": 1, "rope_interleave": True},
        {"mlp_layer_types": ["sparse", "dense", "sparse"]}, {"use_qk_norm": False, "mlp_only_layers": [1]},
    ),
    "solar_open": Family(
        "SolarOpen", {**EXPERTS, **GROUPS, "n_shared_experts": 2, "head_dim": 16, "attention_bias": True},
        ours={"use_qk_norm": False},
    ),
    "minimax_m2": Family(
        "MiniMaxM2", {"num_experts_per_tok": 3, "head_dim": 16}, {"num_local_experts": 8, "rotary_dim": 8},
        {
            "n_routed_experts": 8, "n_shared_experts": 0, "qk_norm_over": "projection", "partial_rotary_factor": 0.5,
        },
    ),
    "ernie4_5_moe": Family(
        "Ernie4_5_Moe", {"moe_intermediate_size": 16, "tie_word_embeddings": True},
        {
            "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
            "moe_layer_interval": 2, "use_bias": True, "pad_token_id": None,
        },
        {
            **SOFTMAX, "num_experts_per_tok": 3, "n_shared_experts": 2, "mlp_only_layers": [0, 2],
            "use_qk_norm": False, "rope_interleave": True, "attention_bias": True, "attention_out_bias": True,
            "mlp_bias": True, "lm_head_bias": True,
        },
    ),
    "mistral": Family("Mistral", {"head_dim": 16}, {"sliding_window": None}, PLAIN),
    "seed_oss": Family(
        "SeedOss", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}, {"pad_token_id": None}, PLAIN,
    ),
    "youtu": Family(
        "Youtu", {**LATENT, "q_lora_rank": 24, "tie_word_embeddings": False, "rope_interleave": True}, ours=PLAIN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_model_equals_transformers(name: str) -> None:
    assert_same_logits_experts_and_gradients(*FAMILIES[name].build(), random_tokens(1, TOKENS))


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 4.0}, LLAMA3, YARN, {**YARN, "attention_factor": 1.25, "truncate": False}],
    ids=["linear", "llama3", "yarn", "yarn_factor"],
)
def test_stretched_positions_equal_transformers(rope: dict[str, Any]) -> None:
    assert_same_logits_experts_and_gradients(*FAMILIES["qwen3"].build(**rope), random_tokens(1, TOKENS))


@pytest.mark.parametrize("name", ["deepseek_v2 with groups", "deepseek_v3"])
@pytest.mark.parametrize(
    "rope",
    [YARN, {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}],
    ids=["no_mscale", "mscale_1", "mscale_differs"],
)
def test_latent_attention_in_stretched_positions_equals_transformers(name: str, rope: dict[str, Any]) -> None:
    assert_same_logits_experts_and_gradients(*FAMILIES[name].build(**rope), random_tokens(1, TOKENS))
