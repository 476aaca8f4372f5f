"""The two ends of the range of configs, Dots1 and GPT-2, against `transformers` with copied weights, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Dots1Config, Dots1ForCausalLM, GPT2Config, GPT2LMHeadModel

from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel
from tests.model.transformers_models import (
    VOCABULARY,
    Tensors,
    assert_same_logits_experts_and_gradients,
    build,
    in_our_layout,
    our_model,
    random_tokens,
)
from tests.tiny import packed

HIDDEN, ROWS, POSITIONS = 32, 3, 17

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
DOTS1 = {
    **SHAPE, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "norm_topk_prob": True,
}  # fmt: skip
DOTS1_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1, "head_dim": 16},
    "first_layers_dense": {"first_k_dense_replace": 2},
    "groups": {"n_group": 4, "topk_group": 2},
    "scaled": {"routed_scaling_factor": 2.5},
    "not_normalised": {"norm_topk_prob": False, "n_shared_experts": 2},
    "every_expert": {"num_experts_per_tok": 8},
    "attention_biases": {"attention_bias": True},
    "tied_embeddings": {"tie_word_embeddings": True},
    "everything": {
        "num_key_value_heads": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "routed_scaling_factor": 1.7, "n_shared_experts": 2, "attention_bias": True, "rms_norm_eps": 1e-5,
    },
}  # fmt: skip


def dots1_and_ours(variant: str) -> tuple[LanguageModel, Dots1ForCausalLM]:
    values = {**DOTS1, **DOTS1_VARIANTS[variant]}
    theirs = build(Dots1ForCausalLM, Dots1Config(**values))
    both_biases = {"attention_out_bias": values.get("attention_bias", False)}  # one key there, two here
    return our_model(ModelConfig(**values, **both_biases), in_our_layout(theirs.state_dict())), theirs


@pytest.mark.parametrize("variant", DOTS1_VARIANTS)
def test_model_equals_dots1(variant: str) -> None:
    assert_same_logits_experts_and_gradients(*dots1_and_ours(variant), random_tokens(ROWS, POSITIONS))


def test_model_equals_dots1_far_from_the_start() -> None:
    """Positions in the thousands, where rounding in the rotary angles would show."""
    ours, theirs = dots1_and_ours("grouped_query")
    tokens = random_tokens(1, POSITIONS)
    from_the_start, attend = packed([POSITIONS])
    logits = ours(tokens, from_the_start + 40_000, attend).logits
    expected = theirs(input_ids=tokens, position_ids=from_the_start + 40_000).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_packed_documents_equal_dots1_on_each_document_alone() -> None:
    ours, theirs = dots1_and_ours("everything")
    lengths, tokens = [4, 1, 9, 3], random_tokens(1, POSITIONS)
    logits = ours(tokens, *packed(lengths)).logits[0]
    for piece, document in zip(logits.split(lengths), tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(piece, theirs(input_ids=document[None]).logits[0], rtol=0, atol=1e-5)


def gpt2_in_our_layout(tensors: Tensors) -> Tensors:
    """GPT-2 keeps linear layers as `[in, out]` and query, key and value in one."""
    names = {
        "transformer.wte.weight": "model.embed_tokens.weight", "transformer.wpe.weight": "model.embed_positions.weight",
        "transformer.ln_f": "model.norm", "transformer.h": "model.layers", "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }  # fmt: skip
    ours: Tensors = {}
    for name, tensor in tensors.items():
        tensor = tensor.mT if ".c_" in name and tensor.ndim == 2 else tensor
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.c_attn" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                ours[name.replace("attn.c_attn", f"self_attn.{part}_proj")] = piece
        else:
            ours[name] = tensor
    return ours


@pytest.mark.parametrize("hidden_act", ["relu", "gelu"])
def test_classic_gpt_equals_gpt2(hidden_act: str) -> None:
    theirs = build(GPT2LMHeadModel, GPT2Config(
        vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=4, n_inner=48, n_positions=64,
        activation_function=hidden_act, tie_word_embeddings=False,
    ))  # fmt: skip
    config = ModelConfig(**{
        **SHAPE, "num_hidden_layers": 2, "hidden_act": hidden_act, "norm_type": "layernorm", "rms_norm_eps": 1e-5,
        "mlp_gated": False, "position_embedding": "learned", "use_qk_norm": False, "attention_bias": True,
        "attention_out_bias": True, "mlp_bias": True,
    })  # fmt: skip
    ours = our_model(config, gpt2_in_our_layout(theirs.state_dict()))
    assert_same_logits_experts_and_gradients(ours, theirs, random_tokens(ROWS, POSITIONS), gpt2_in_our_layout)
