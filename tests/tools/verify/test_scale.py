"""The small model that the parity check trains is of the same kind as the config's."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.model.size import count_parameters
from moe_lm.tools.verify.scale import LENGTH, small_model
from tests.processes import ROOT

FILES = sorted((ROOT / "configs" / "model").glob("*.yaml"))
SIZES = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok",
    "n_shared_experts", "shared_expert_intermediate_size", "first_k_dense_replace",
    "mlp_only_layers", "n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
    "v_head_dim", "rope_scaling", "partial_rotary_factor", "initializer_range",
}  # fmt: skip
QWEN2_MOE = ModelConfig(
    vocab_size=151_936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, intermediate_size=5632,
    moe_intermediate_size=1408, n_routed_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632,
    shared_expert_gate=True, mlp_only_layers=(3, 7), partial_rotary_factor=0.25, qk_norm_over="projection",
    scoring_func="softmax",
    rope_scaling={
        "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 8192,
    },
)  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_small_model_keeps_all_but_sizes(path: Path) -> None:
    whole = load_config(ModelConfig, path)
    small = small_model(whole)
    for name in ModelConfig.model_fields:
        if name not in SIZES:
            assert getattr(small, name) == getattr(whole, name), name
    assert (small.kv_lora_rank is None) == (whole.kv_lora_rank is None)
    assert (small.q_lora_rank is None) == (whole.q_lora_rank is None)
    assert bool(small.moe_layers) == bool(whole.moe_layers)
    assert len(small.moe_layers) < small.num_hidden_layers or len(whole.moe_layers) == whole.num_hidden_layers
    assert count_parameters(small).total < 200_000


def test_a_small_model_has_what_qwen2_moe_and_long_contexts_have() -> None:
    small = small_model(QWEN2_MOE)
    assert small.shared_expert_gate
    assert small.shared_width != small.n_shared_experts * small.expert_size
    assert small.mlp_only_layers == (1,)
    assert small.moe_layers == [0, 2]
    assert small.rotary_size < small.head_size
    assert small.rope_scaling is not None
    assert small.rope_scaling.rope_type == "llama3"
    assert small.rope_scaling.original_max_position_embeddings is not None
    assert small.rope_scaling.original_max_position_embeddings < LENGTH


def test_the_parts_of_a_small_latent_head_differ_in_size() -> None:
    small = small_model(load_config(ModelConfig, FILES[0].parent / "deepseek-v3.yaml"))
    assert small.head_size != small.value_size
    assert small.rotary_size < small.head_size
