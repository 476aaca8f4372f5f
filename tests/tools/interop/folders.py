"""Folders as `transformers` writes them: a small random model of every family, beside this project's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from moe_lm.model.moe import all_logical
from moe_lm.tokenizer.tokenizer import Tokenizer

SHAPE = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 160,
}  # fmt: skip
ALL_SPARSE = {
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "routed_scaling_factor": 1.7, "n_group": 2, "topk_group": 1,
}  # fmt: skip
DEEPSEEK = ALL_SPARSE | {"first_k_dense_replace": 1}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 40, "mscale": 0.7,
    "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2}

# A model_type, and what differs in this variant of it.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dots1": ("dots1", SHAPE | DEEPSEEK | {"norm_topk_prob": True}),
    "dots1 biased": ("dots1", SHAPE | DEEPSEEK | {"attention_bias": True, "n_group": 1}),
    "glm4_moe": ("glm4_moe", SHAPE | DEEPSEEK | {"attention_bias": True, "use_qk_norm": True, "head_dim": 16}),
    "glm4_moe plain": ("glm4_moe", SHAPE | DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", SHAPE | DEEPSEEK | LATENT | {"q_lora_rank": 24, "rope_parameters": YARN}),
    "deepseek_v3 whole queries": (
        "deepseek_v3", SHAPE | DEEPSEEK | LATENT | {"q_lora_rank": None, "rms_norm_eps": 1e-3},
    ),
    "deepseek_v2": (
        "deepseek_v2", SHAPE | DEEPSEEK | LATENT | {"q_lora_rank": 24, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2 lite": (
        "deepseek_v2", SHAPE | DEEPSEEK | LATENT | {"q_lora_rank": None, "n_group": 1, "rope_parameters": YARN},
    ),
    "qwen2_moe": ("qwen2_moe", SHAPE | EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe some dense": ("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 8, "mlp_only_layers": [1]}),
    "mixtral": ("mixtral", SHAPE | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", SHAPE | {"num_experts": 8, "num_experts_per_tok": 2, "eos_token_id": 1}),
    "llama": ("llama", SHAPE | {"rope_parameters": LLAMA3}),
    "llama tied": ("llama", SHAPE | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", SHAPE | {"rope_parameters": YARN}),
    "qwen2 tied": ("qwen2", SHAPE | {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen3": ("qwen3", SHAPE | {"head_dim": 8}),
    "qwen3 tied": ("qwen3", SHAPE | {"head_dim": 8, "tie_word_embeddings": True}),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        SHAPE | ALL_SPARSE | LATENT | {"q_lora_rank": 24, "mlp_layer_types": ["sparse", "dense", "sparse"]},
    ),
    "solar_open": ("solar_open", SHAPE | ALL_SPARSE | {"head_dim": 16, "attention_bias": True, "n_shared_experts": 1}),
    "minimax_m2": (
        "minimax_m2", SHAPE | {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16, "rotary_dim": 8},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        SHAPE | {
            "moe_intermediate_size": 16, "moe_num_experts": 8, "moe_k": 3, "use_bias": True, "num_hidden_layers": 3,
            "moe_layer_start_index": 1, "moe_layer_interval": 2, "pad_token_id": None,
        },
    ),
    "mistral": ("mistral", SHAPE | {"head_dim": 16, "sliding_window": None}),
    "seed_oss": ("seed_oss", SHAPE | {"head_dim": 16, "mlp_bias": True}),
    "youtu": (
        "youtu", SHAPE | LATENT | {"q_lora_rank": 24, "rope_parameters": YARN, "tie_word_embeddings": False},
    ),
}  # fmt: skip


def write_folder(folder: Path, variant: str, tokenizer: Tokenizer, **saving: Any) -> Path:
    """What `save_pretrained` makes of a random model of this variant; `dtype` is what it is kept in."""
    model_type, values = FAMILIES[variant]
    dtype = saving.pop("dtype", torch.float32)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**values))
    randomise(model)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # kept in float32, as it is in published checkpoints
            buffer.data = buffer.float()
    model.save_pretrained(folder, **saving)
    tokenizer.save(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The tensors in all files of a folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def randomise(model: nn.Module) -> None:
    """Weights that keep activations and logits of order 1, so that an absolute difference means something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in all_logical([*model.named_parameters(), *model.named_buffers()]).items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5 / (2 if name == "lm_head.weight" else 1))
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.2)
            elif name.endswith("weight"):
                tensor.copy_(1 + noise * 0.2)
