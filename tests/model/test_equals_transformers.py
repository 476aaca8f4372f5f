"""The whole model against `transformers`, with copied weights: logits and gradients, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Dots1Config,
    Dots1ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel
from moe_lm.model_config import ModelConfig

VOCABULARY, HIDDEN, ROWS, POSITIONS = 64, 32, 3, 17
Tensors = dict[str, Tensor]

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


def randomised(theirs: nn.Module) -> nn.Module:
    """Weights that keep activations and logits of order 1, so that an absolute difference means something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.2)
            elif name.endswith("weight"):
                tensor.copy_(1 + noise * 0.2)
    return theirs.eval()


def build(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    return randomised(kind._from_config(config, attn_implementation="eager", experts_implementation="eager"))


def in_our_layout(tensors: Tensors) -> Tensors:
    """Names are the same; stacked experts are `[E, in, out]` here and `[E, out, in]`, gate over up, there."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                ours[name.replace("gate_up_proj", part)] = half.mT
        elif name.endswith("experts.down_proj"):
            ours[name] = tensor.mT
        else:
            ours[name] = tensor
    return ours


def gradients(model: nn.Module) -> Tensors:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def our_model(config: ModelConfig, weights: Tensors) -> LanguageModel:
    model = LanguageModel(config)
    model.initialise(0)  # only for the balance biases that a model without them lacks
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("e_score_correction_bias") for name in missing)
    return model


def rows_apart(rows: int, positions: int) -> tuple[Tensor, PackedAttention]:
    position_ids = torch.arange(positions).expand(rows, -1)
    return position_ids, PackedAttention(torch.arange(rows + 1, dtype=torch.int32) * positions, positions)


def random_tokens(rows: int = ROWS, positions: int = POSITIONS) -> Tensor:
    return torch.randint(VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(5))


def assert_same_logits_and_gradients(ours: LanguageModel, theirs: PreTrainedModel, layout: Any = in_our_layout) -> None:
    """Largest absolute difference of logits 1e-5, and the gradients of the next-token loss for every weight."""
    tokens = random_tokens()
    logits = ours(tokens, *rows_apart(ROWS, POSITIONS)).logits
    expected = theirs(input_ids=tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    for output in (logits, expected):
        F.cross_entropy(output[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found, wanted = gradients(ours), layout(gradients(theirs))
    assert found.keys() == wanted.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def dots1_and_ours(variant: str) -> tuple[LanguageModel, Dots1ForCausalLM]:
    values = {**DOTS1, **DOTS1_VARIANTS[variant]}
    theirs = build(Dots1ForCausalLM, Dots1Config(**values))
    both_biases = {"attention_out_bias": values.get("attention_bias", False)}  # one key there, two here
    return our_model(ModelConfig(**values, **both_biases), in_our_layout(theirs.state_dict())), theirs


@pytest.mark.parametrize("variant", DOTS1_VARIANTS)
def test_model_equals_dots1(variant: str) -> None:
    assert_same_logits_and_gradients(*dots1_and_ours(variant))


def test_model_equals_dots1_far_from_the_start() -> None:
    """Positions in the thousands, where rounding in the rotary angles would show."""
    ours, theirs = dots1_and_ours("grouped_query")
    positions = torch.arange(POSITIONS) + 40_000
    tokens = random_tokens(1)
    attend = PackedAttention(torch.tensor([0, POSITIONS], dtype=torch.int32), POSITIONS)
    logits = ours(tokens, positions[None], attend).logits
    expected = theirs(input_ids=tokens, position_ids=positions[None]).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_packed_documents_equal_dots1_on_each_document_alone() -> None:
    ours, theirs = dots1_and_ours("everything")
    lengths = [4, 1, 9, 3]
    tokens = random_tokens(1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    attend = PackedAttention(torch.tensor([0, *lengths]).cumsum(0).int(), max(lengths))
    logits = ours(tokens, positions, attend).logits[0]
    for piece, document in zip(logits.split(lengths), tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(piece, theirs(input_ids=document[None]).logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dense_model_equals_qwen3(kv_heads: int) -> None:
    values = {**SHAPE, "num_key_value_heads": kv_heads, "head_dim": 8}
    theirs = build(Qwen3ForCausalLM, Qwen3Config(**values))
    assert_same_logits_and_gradients(our_model(ModelConfig(**values), theirs.state_dict()), theirs)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_softmax_routed_model_equals_qwen3_moe(norm_topk_prob: bool) -> None:
    values = {**SHAPE, "head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    values["norm_topk_prob"] = norm_topk_prob
    theirs = build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**values, num_experts=8))
    config = ModelConfig(**values, n_routed_experts=8, n_shared_experts=0, scoring_func="softmax")
    assert_same_logits_and_gradients(our_model(config, in_our_layout(theirs.state_dict())), theirs)


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
    assert_same_logits_and_gradients(ours, theirs, gpt2_in_our_layout)
