"""The model families of Hugging Face that can be read and written: each a table of names, no code.

A family says what the keys of its config.json are called here (`keys`), what they must be because the family, or this
program, knows nothing else (`constants`), what its models always are (`always`), and how its tensors are named where
that is not our name (`tensors`). `hf_config.py` and `hf_tensors.py` read the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

REQUIRED = object()
EACH_EXPERT = {name: f"mlp.experts.{{expert}}.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}


@dataclass(frozen=True)
class Key:
    """A key of config.json, the settings of ours that it gives, and what it is where the file leaves it out."""

    theirs: str
    ours: tuple[str, ...]  # all get the value; the last one gives it back
    default: Any = REQUIRED
    other_names: tuple[str, ...] = ()


def same(*required: str, **defaults: Any) -> tuple[Key, ...]:
    """Keys with our names, first those that a config.json must have."""
    return tuple(
        Key(name, (name,), default) for name, default in (dict.fromkeys(required, REQUIRED) | defaults).items()
    )


@dataclass(frozen=True)
class Family:
    """A `model_type` of config.json."""

    model_type: str
    architecture: str
    keys: tuple[Key, ...]  # of two with one name the later counts
    always: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)  # a part of our names -> a part of theirs
    expert_tensors: Mapping[str, str] = field(default_factory=lambda: EACH_EXPERT)
    router_bias: bool = False  # whether it has a tensor for the bias that balances the load
    router_bias_shape: Literal["E", "1 E"] = "E"
    # How it says which layers have no experts; OF_DENSE_LAYERS in hf_config.py has the keys.
    dense_layers: Literal["first", "listed", "types", "interval", "none"] = "first"
    may_lack_shared_experts: bool = False
    sliding_window: int | None = None  # where the file leaves it out
    rope_theta: float = 10_000.0
    # The share of a head that is rotated, where the file leaves it out. None: all of it, whatever a file says, because
    # the class in `transformers` does not read the key.
    partial_rotary_factor: float | None = None
    rotary_dim: bool = False  # whether the file may give the number of rotated entries instead of their share

    @property
    def is_latent(self) -> bool:
        return self._has_key("kv_lora_rank")

    @property
    def has_experts(self) -> bool:
        return self._has_key("n_routed_experts")

    @property
    def has_shared_experts(self) -> bool:
        """Whether every layer with experts has shared ones too, as many as the file says."""
        return self._has_key("n_shared_experts") and not self.may_lack_shared_experts

    @property
    def rotary_settings(self) -> tuple[str, ...]:
        """The settings of rotary positions that the family has, in our names."""
        partial = () if self.partial_rotary_factor is None else ("partial_rotary_factor",)
        return ("rope_theta", "rope_scaling", *partial)

    def _has_key(self, ours: str) -> bool:
        return any(ours in key.ours for key in self.keys)


MIXTRAL_EXPERTS = {
    name: f"block_sparse_moe.experts.{{expert}}.{letter}.weight"
    for name, letter in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
}

SHAPE = same(
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
    hidden_act="silu", tie_word_embeddings=False, initializer_range=0.02,
)  # fmt: skip
FEED_FORWARD = same("intermediate_size")
HEADS = same(num_key_value_heads=None, head_dim=None)
ALL_HEADS = same("num_key_value_heads", "head_dim")  # whose classes have other values where the file leaves them out
BIAS_ON_ALL = (Key("attention_bias", ("attention_bias", "attention_out_bias"), False),)
LATENT = (*same(q_lora_rank=None), *same("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
DEEPSEEK_EXPERTS = same(
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_shared_experts",
    routed_scaling_factor=1.0, n_group=1, topk_group=1,
)  # fmt: skip
NUM_EXPERTS = Key("num_experts", ("n_routed_experts",), other_names=("num_local_experts",))
NUM_LOCAL_EXPERTS = Key("num_local_experts", ("n_routed_experts",), other_names=("num_experts",))
QWEN_EXPERTS = (*same("moe_intermediate_size"), NUM_EXPERTS, *same("num_experts_per_tok", norm_topk_prob=False))
WIDTH = Key("intermediate_size", ("intermediate_size", "moe_intermediate_size"))  # of experts as of a dense layer
WIDTH_OF_EXPERTS = Key("moe_intermediate_size", ("intermediate_size", "moe_intermediate_size"))  # all layers have them
WIDE_EXPERTS = (WIDTH, *same("num_experts_per_tok"))

PLAIN = {  # what every family here is
    "norm_type": "rmsnorm", "mlp_gated": True, "position_embedding": "rope", "lm_head_bias": False,
    "capacity_factor": None, "mlp_bias": False, "rope_interleave": False, "qk_norm_over": "head",
    "shared_expert_gate": False,
}  # fmt: skip
NO_EXPERTS = {"n_routed_experts": 0}
NOT_SHARED = {"n_shared_experts": 0, "scoring_func": "softmax", "routed_scaling_factor": 1.0, "n_group": 1}
DEEPSEEK_V3_ROUTER = {"scoring_func": ("sigmoid", "noaux_tc"), "topk_method": "noaux_tc", "moe_layer_freq": 1}

FAMILIES = (
    Family(
        "dots1",
        "Dots1ForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS, *BIAS_ON_ALL, *DEEPSEEK_EXPERTS,
            *same(norm_topk_prob=False),
        ),
        PLAIN | {"scoring_func": "sigmoid", "use_qk_norm": True},
        constants=DEEPSEEK_V3_ROUTER,
        router_bias=True,
    ),
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-5), *FEED_FORWARD, *HEADS, *same(attention_bias=False), *DEEPSEEK_EXPERTS,
            *same(norm_topk_prob=True, use_qk_norm=False),
        ),
        PLAIN | {"scoring_func": "sigmoid", "attention_out_bias": False},
        constants=DEEPSEEK_V3_ROUTER,
        router_bias=True,
        partial_rotary_factor=0.5,
    ),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *LATENT, *BIAS_ON_ALL, *DEEPSEEK_EXPERTS,
            *same(norm_topk_prob=True, rope_interleave=True),
        ),
        PLAIN | {"scoring_func": "sigmoid", "use_qk_norm": False},
        constants=DEEPSEEK_V3_ROUTER,
        router_bias=True,
    ),
    Family(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *LATENT, *BIAS_ON_ALL, *DEEPSEEK_EXPERTS),
        PLAIN | {"scoring_func": "softmax", "use_qk_norm": False, "norm_topk_prob": False, "rope_interleave": True},
        constants={
            "scoring_func": "softmax", "topk_method": ("group_limited_greedy", "greedy"), "norm_topk_prob": False,
            "moe_layer_freq": 1, "mlp_bias": False,
        },
    ),
    Family(
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-5), *FEED_FORWARD, *LATENT, *BIAS_ON_ALL, *DEEPSEEK_EXPERTS,
            *same(routed_scaling_factor=1.8, norm_topk_prob=True, rope_interleave=True),
        ),
        PLAIN | {"scoring_func": "sigmoid", "use_qk_norm": False},
        constants=DEEPSEEK_V3_ROUTER,
        router_bias=True,
        dense_layers="types",
    ),
    Family(
        "solar_open",
        "SolarOpenForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-5), *ALL_HEADS, *same(attention_bias=False), *DEEPSEEK_EXPERTS,
            WIDTH_OF_EXPERTS, *same(norm_topk_prob=True),
        ),
        PLAIN | {"scoring_func": "sigmoid", "use_qk_norm": False, "attention_out_bias": False},
        constants={"use_qk_norm": False},
        router_bias=True,
        dense_layers="none",
        rope_theta=1e6,
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *ALL_HEADS, *WIDE_EXPERTS, NUM_LOCAL_EXPERTS),
        PLAIN | NOT_SHARED | {
            "scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_over": "projection", "norm_topk_prob": True,
            "attention_bias": False, "attention_out_bias": False,
        },
        constants={"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer"},
        tensors={"mlp.gate.e_score": "block_sparse_moe.e_score", "mlp.gate.": "block_sparse_moe.gate."},
        expert_tensors=MIXTRAL_EXPERTS,
        router_bias=True,
        dense_layers="none",
        rope_theta=5e6,
        partial_rotary_factor=1.0,
        rotary_dim=True,
    ),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        (
            *SHAPE, *same(tie_word_embeddings=True, rms_norm_eps=1e-5), *FEED_FORWARD,
            *same("num_key_value_heads", head_dim=None), *same("moe_intermediate_size"),
            Key("use_bias", ("attention_bias", "attention_out_bias", "mlp_bias", "lm_head_bias"), False),
            Key("moe_num_experts", ("n_routed_experts",)), Key("moe_k", ("num_experts_per_tok",)),
            Key("moe_num_shared_experts", ("n_shared_experts",), 2),
        ),
        PLAIN | {
            "scoring_func": "softmax", "use_qk_norm": False, "norm_topk_prob": True, "rope_interleave": True,
            "routed_scaling_factor": 1.0, "n_group": 1,
        },
        constants={"moe_norm_min": 1e-12},
        tensors={"mlp.gate.e_score": "mlp.moe_statics.e_score"},
        router_bias=True,
        router_bias_shape="1 E",
        dense_layers="interval",
        may_lack_shared_experts=True,
        rope_theta=5e5,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS, *BIAS_ON_ALL, *QWEN_EXPERTS),
        PLAIN | NOT_SHARED | {"use_qk_norm": True},
        constants={"use_sliding_window": False},
        dense_layers="listed",
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS, Key("qkv_bias", ("attention_bias",), True),
            *QWEN_EXPERTS, *same("shared_expert_intermediate_size"),
        ),
        PLAIN | NOT_SHARED | {
            "use_qk_norm": False, "attention_out_bias": False, "n_shared_experts": 1, "shared_expert_gate": True,
        },
        constants={"use_sliding_window": False},
        tensors={"mlp.shared_experts.": "mlp.shared_expert."},
        dense_layers="listed",
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-5), *HEADS, *WIDE_EXPERTS, NUM_LOCAL_EXPERTS),
        PLAIN | NOT_SHARED | {
            "use_qk_norm": False, "norm_topk_prob": True, "attention_bias": False, "attention_out_bias": False,
        },
        tensors={"mlp.gate.": "block_sparse_moe.gate."},
        expert_tensors=MIXTRAL_EXPERTS,
        dense_layers="none",
        rope_theta=1e6,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-5, num_key_value_heads=None), *BIAS_ON_ALL, *WIDE_EXPERTS,
            NUM_EXPERTS,
            *same(norm_topk_prob=False),
        ),
        PLAIN | NOT_SHARED | {"use_qk_norm": True, "qk_norm_over": "projection", "head_dim": None},
        constants={"clip_qkv": None},
        dense_layers="none",
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS, *BIAS_ON_ALL),
        PLAIN | NO_EXPERTS | {"use_qk_norm": True},
        constants={"use_sliding_window": False},
        dense_layers="none",
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS),
        PLAIN | NO_EXPERTS | {"use_qk_norm": False, "attention_bias": True, "attention_out_bias": False},
        constants={"use_sliding_window": False, "use_mrope": False},
        dense_layers="none",
    ),
    Family(
        "llama",
        "LlamaForCausalLM",
        (*SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *HEADS, *BIAS_ON_ALL, *same(mlp_bias=False)),
        PLAIN | NO_EXPERTS | {"use_qk_norm": False},
        dense_layers="none",
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        (*SHAPE, *same("num_key_value_heads", rms_norm_eps=1e-6, head_dim=None), *FEED_FORWARD),
        PLAIN | NO_EXPERTS | {"use_qk_norm": False, "attention_bias": False, "attention_out_bias": False},
        dense_layers="none",
        sliding_window=4096,
    ),
    Family(
        "seed_oss",
        "SeedOssForCausalLM",
        (
            *SHAPE, *same(rms_norm_eps=1e-6), *FEED_FORWARD, *ALL_HEADS,
            *same(attention_bias=True, attention_out_bias=False, mlp_bias=False),
        ),
        PLAIN | NO_EXPERTS | {"use_qk_norm": False},
        dense_layers="none",
    ),
    Family(
        "youtu",
        "YoutuForCausalLM",
        (
            *SHAPE, *same(tie_word_embeddings=True, rms_norm_eps=1e-6), *FEED_FORWARD, *LATENT,
            *BIAS_ON_ALL, *same(rope_interleave=True),
        ),
        PLAIN | NO_EXPERTS | {"use_qk_norm": False},
        constants={"mlp_bias": False},
        dense_layers="none",
    ),
)  # fmt: skip

# Keys that announce layers for multi-token prediction.
MTP_KEYS = (
    "mtp_transformer_layers", "num_mtp_layers", "num_mtp_modules", "num_nextn_predict_layers", "use_mtp",
)  # fmt: skip
# Keys of config.json that say how a model was trained, made or served, nothing about its numbers.
WITHOUT_MEANING = {
    *MTP_KEYS, "_name_or_path", "architectures", "attention_dropout", "attn_type_list", "auto_map", "aux_loss_alpha",
    "bos_token_id", "dtype", "embedding_initializer_range", "eos_token_id", "ep_size", "max_window_layers",
    "model_type", "output_router_logits", "pad_token_id", "pretraining_tp", "qk_head_dim", "residual_dropout",
    "router_aux_loss_coef", "router_jitter_noise", "seq_aux", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def family_of(model_type: object) -> Family | None:
    return next((family for family in FAMILIES if family.model_type == model_type), None)


def known_families() -> str:
    return ", ".join(family.model_type for family in FAMILIES)
