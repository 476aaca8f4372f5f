"""The small model of the same kind as the config's, and its training."""

from __future__ import annotations

from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import RunConfig
from moe_lm.config.training import BalanceConfig, OptimizerConfig, PreferenceConfig, ScheduleConfig, TrainConfig

STEPS = 5
BATCH = 8  # rows of a global batch: each of 4 ranks has 2 to accumulate over
LENGTH = 24  # tokens of a row
VOCABULARY = 64
EXPERTS = 8
LATENT_SIZES = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
REACH = 3  # largest factor of rotary scaling
PAD = 2
FAVOURED, AVOIDED = 1, EXPERTS - 2  # experts that get most tokens, and none, by their router bias


def small_model(model: ModelConfig) -> ModelConfig:
    """The config with every size reduced; routing, norms, attention and ties stay as they are."""
    dense_layers = bool(model.n_routed_experts) and len(model.moe_layers) < model.num_hidden_layers
    sizes: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3 if dense_layers else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": None if model.kv_heads == model.num_attention_heads else 2,
        "head_dim": None if model.head_dim is None else 16,
        **(LATENT_SIZES if model.kv_lora_rank else {}),
        "q_lora_rank": None if model.q_lora_rank is None else 16,
        "intermediate_size": 48,
        "moe_intermediate_size": None if model.moe_intermediate_size is None else 16,
        "max_position_embeddings": LENGTH,
        "first_k_dense_replace": min(model.first_k_dense_replace, 1),
        "mlp_only_layers": (1,) if model.mlp_only_layers else (),
        "n_shared_experts": min(model.n_shared_experts, 2),
        "shared_expert_intermediate_size": None if model.shared_expert_intermediate_size is None else 24,
        "partial_rotary_factor": 0.5 if model.partial_rotary_factor < 1 else 1.0,
        # Large enough that so few weights matter and routers choose clearly. Latent attention has two matrices in a
        # row, and the norm between them magnifies rounding.
        "initializer_range": 0.15 if model.kv_lora_rank else 0.2,
    }
    return ModelConfig.model_validate(model.model_dump() | sizes | _rope(model) | _routing(model))


def _rope(model: ModelConfig) -> dict[str, object]:
    """The same rotary scaling, reduced to the positions of the small model.

    YaRN sharpens attention with the factor; a large factor magnifies rounding beyond the tolerance.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    sizes = {"factor": min(scaling.factor, REACH)}
    if scaling.original_max_position_embeddings is not None:
        sizes["original_max_position_embeddings"] = LENGTH // REACH
    return {"rope_scaling": scaling.model_dump() | sizes}


def _routing(model: ModelConfig) -> dict[str, int]:
    if not model.n_routed_experts:
        return {}
    if model.num_experts_per_tok == model.n_routed_experts:  # every expert is weighted
        return {"n_routed_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "n_group": 1, "topk_group": 1}
    groups = 1 if model.n_group == 1 else 2 if model.n_group < 4 else 4
    kept = max(1, min(groups, round(model.topk_group * groups / model.n_group)))
    reachable = kept * EXPERTS // groups
    return {
        "n_routed_experts": EXPERTS,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": min(model.num_experts_per_tok, 3, reachable - 1),  # so that one expert can be avoided
    }


def small_lora(lora: LoraConfig | None) -> LoraConfig | None:
    """The same adapters with a small rank, and with alpha equal to it: alpha magnifies rounding too."""
    rank = min(lora.rank, 4) if lora else 0
    return lora and lora.model_copy(update={"rank": rank, "alpha": float(rank)})


def strong_preference(preference: PreferenceConfig | None) -> PreferenceConfig | None:
    """The same loss, with a beta large enough for gradients that are clipped."""
    return preference and preference.model_copy(update={"beta": max(preference.beta, 0.5)})


def training(config: RunConfig) -> TrainConfig:
    """A few steps in which every part of the update has a visible effect.

    All balance terms are on, with large weights: with the config's own a wrong term may not show. The optimizer is
    AdamW, which every engine has. Its eps is not tiny, or a gradient of rounding noise would move a weight as far as a
    real gradient does.
    """
    sampling = config.train.scheduled_sampling
    return TrainConfig(
        steps=STEPS,
        global_batch_size=BATCH,
        seed=config.train.seed,
        precision="bfloat16" if config.train.precision == "bfloat16" else "float32",
        optimizer=OptimizerConfig(lr=0.01, betas=config.train.optimizer.betas, eps=1e-4),
        schedule=ScheduleConfig(name="constant", warmup_steps=2),
        freeze_router=config.train.freeze_router,
        scheduled_sampling=sampling and sampling.model_copy(update={"ramp_steps": 0}),
        balance=BalanceConfig(bias_update_rate=0.01, sequence_loss=0.3, batch_loss=0.5, z_loss=0.1),
        clip_norm=0.5,  # every step's gradient is longer, or `easy_steps` says so
    )
