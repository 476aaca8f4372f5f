"""The shape of a model and what must hold within it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moe_lm.config.section import Section


class RopeScaling(Section):
    """How rotary positions reach beyond the length that they were trained on, in Hugging Face's names.

    `linear` divides every frequency by `factor` (arXiv 2306.15595); `llama3` only the slow ones, with a ramp between
    (arXiv 2407.21783); `yarn` likewise with a ramp over rotations, and sharpens the attention (arXiv 2309.00071).
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1)
    original_max_position_embeddings: int | None = Field(default=None, gt=0, description="llama3, yarn: trained length")
    low_freq_factor: float | None = Field(default=None, gt=0, description="llama3")
    high_freq_factor: float | None = Field(default=None, gt=0, description="llama3")
    beta_fast: float | None = Field(default=None, gt=0, description="yarn; None: 32")
    beta_slow: float | None = Field(default=None, gt=0, description="yarn; None: 1")
    mscale: float | None = Field(default=None, ge=0, description="yarn, as DeepSeek uses it")
    mscale_all_dim: float | None = Field(default=None, ge=0, description="yarn, as DeepSeek uses it")
    attention_factor: float | None = Field(default=None, gt=0, description="yarn; None: from factor and mscale")
    truncate: bool = Field(default=True, description="yarn: the ramp begins and ends at whole dimensions")

    @model_validator(mode="after")
    def _keys_belong_to_the_type(self) -> Self:
        needed = {
            "linear": set(),
            "llama3": {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
            "yarn": {"original_max_position_embeddings"},
        }[self.rope_type]
        of_yarn = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
        read = {"rope_type", "factor"} | needed | (of_yarn if self.rope_type == "yarn" else set())
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in needed and value is None:
                raise ValueError(f"rope_type={self.rope_type} needs {name}; set it")
            if name not in read and value != field.default:
                raise ValueError(f"{name}={value} has no meaning with rope_type={self.rope_type}; remove it")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor={high} is not more than low_freq_factor={low}; raise it")
        return self


class ModelConfig(Section):
    """The shape of a model, in the names of the field's model configs (Hugging Face, DeepSeek).

    The defaults are the DeepSeekMoE form: RMSNorm, rotary positions, QK-norm, SwiGLU, sigmoid router.
    `n_routed_experts: 0` makes every layer dense; `num_experts_per_tok` equal to `n_routed_experts` weights
    every expert; `capacity_factor` makes a layer drop tokens as Switch and GShard do.
    """

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(default=None, gt=0, description="None: as many as attention heads")
    head_dim: int | None = Field(default=None, gt=0, description="None: hidden_size / num_attention_heads")
    q_lora_rank: int | None = Field(default=None, gt=0, description="latent attention: size of the compressed query")
    kv_lora_rank: int | None = Field(default=None, gt=0, description="size of the latent; set: latent attention (MLA)")
    qk_nope_head_dim: int | None = Field(default=None, gt=0, description="latent attention: part without a position")
    qk_rope_head_dim: int | None = Field(default=None, gt=0, description="latent attention: part that is rotated")
    v_head_dim: int | None = Field(default=None, gt=0, description="latent attention: size of a head's values")
    intermediate_size: int = Field(gt=0, description="width of a dense feed-forward layer")
    max_position_embeddings: int = Field(default=4096, gt=0)

    moe_intermediate_size: int | None = Field(default=None, gt=0, description="width of one expert")
    n_routed_experts: int = Field(default=0, ge=0)
    num_experts_per_tok: int = Field(default=2, gt=0)
    n_shared_experts: int = Field(default=1, ge=0)
    shared_expert_intermediate_size: int | None = Field(
        default=None, gt=0, description="width of the shared experts together; None: n_shared_experts times one expert"
    )
    shared_expert_gate: bool = Field(default=False, description="a sigmoid gate on their output, as in Qwen2-MoE")
    first_k_dense_replace: int = Field(default=0, ge=0, description="this many first layers stay dense")
    moe_layer_freq: int = Field(default=1, gt=0, description="every n-th layer is MoE, counted as DeepSeek does")
    mlp_only_layers: tuple[int, ...] = Field(default=(), description="further layers, counted from 0, that stay dense")
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    capacity_factor: float | None = Field(default=None, gt=0, description="None: dropless")

    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    hidden_act: Literal["silu", "relu", "gelu"] = "silu"
    mlp_gated: bool = Field(default=True, description="gated feed-forward (SwiGLU when hidden_act is silu)")
    position_embedding: Literal["rope", "learned", "sinusoidal"] = "rope"
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = Field(default=False, description="neighbours are rotated together, not halves")
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1, description="share of a head that is rotated")
    use_qk_norm: bool = True
    qk_norm_over: Literal["head", "projection"] = Field(default="head", description="projection: all heads together")
    attention_bias: bool = Field(default=False, description="bias on the projections of the hidden state")
    attention_out_bias: bool = False
    mlp_bias: bool = Field(default=False, description="in dense and shared feed-forward layers; experts have none")
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = Field(default=0.02, gt=0)

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Entries of a query or key."""
        if self.qk_nope_head_dim and self.qk_rope_head_dim:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def value_size(self) -> int:
        """Entries of a head's values, and of what it attends to."""
        return self.v_head_dim or self.head_size

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def shared_width(self) -> int:
        """Width of the shared experts together; 0 without any."""
        if not self.n_shared_experts:
            return 0
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.expert_size

    @property
    def rotary_size(self) -> int:
        """Entries of a head that are rotated."""
        return self.qk_rope_head_dim or int(self.head_size * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` (counted from 0) has routed experts."""
        routed = self.n_routed_experts > 0 and layer >= self.first_k_dense_replace
        return routed and layer % self.moe_layer_freq == 0 and layer not in self.mlp_only_layers

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        self._check_latent()
        if self.kv_lora_rank is None and self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}; choose a divisor or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.kv_heads} does not divide num_attention_heads="
                f"{self.num_attention_heads}; choose a divisor"
            )
        self._check_rotary()
        if self.qk_norm_over == "projection" and not self.use_qk_norm:
            raise ValueError("qk_norm_over=projection has no meaning with use_qk_norm=False; remove it")
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd; sinusoidal positions need an even size")
        if self.n_routed_experts:
            self._check_routing()
        return self

    def _check_latent(self) -> None:
        sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.kv_lora_rank is None:
            for name in ("q_lora_rank", *sizes):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} needs kv_lora_rank (latent attention); set it")
            return
        latent = f"kv_lora_rank={self.kv_lora_rank} (latent attention)"
        for name in sizes:
            if getattr(self, name) is None:
                raise ValueError(f"{latent} needs {name}; set it")
        for name, wanted in (
            ("head_dim", None),
            ("num_key_value_heads", self.num_attention_heads),
            ("use_qk_norm", False),
            ("partial_rotary_factor", 1.0),
            ("position_embedding", "rope"),
        ):
            value = getattr(self, name)
            if value != wanted and value is not None:
                advice = "remove it" if wanted is None else f"set it to {wanted}"
                raise ValueError(f"{name}={value} does not go with {latent}; {advice}")

    def _check_rotary(self) -> None:
        if self.position_embedding != "rope":
            for name in ("rope_scaling", "rope_interleave", "partial_rotary_factor"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no meaning with position_embedding="
                        f"{self.position_embedding}; remove it"
                    )
        elif self.qk_rope_head_dim and self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rotary positions need an even size")
        elif self.kv_lora_rank is None and self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions need an even head size")
        elif self.rotary_size % 2 or not self.rotary_size:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} rotates {self.rotary_size} of a head's "
                f"{self.head_size} entries; choose a share that makes an even number of at least 2"
            )

    def _check_routing(self) -> None:
        experts, per_token = self.n_routed_experts, self.num_experts_per_tok
        if per_token > experts:
            raise ValueError(
                f"num_experts_per_tok={per_token} is more than n_routed_experts={experts}; choose at most {experts}"
            )
        if experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} does not divide n_routed_experts={experts}; choose a divisor")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        reachable = self.topk_group * (experts // self.n_group)
        if per_token > reachable:
            raise ValueError(
                f"num_experts_per_tok={per_token} is more than the {reachable} experts that topk_group="
                f"{self.topk_group} of n_group={self.n_group} leave; choose at most {reachable}"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace={self.first_k_dense_replace} is more than num_hidden_layers="
                f"{self.num_hidden_layers}; choose at most {self.num_hidden_layers}"
            )
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"mlp_only_layers={list(self.mlp_only_layers)} names layer {layer}; choose from 0 to "
                    f"{self.num_hidden_layers - 1}"
                )
        if not self.n_shared_experts:
            for name in ("shared_expert_intermediate_size", "shared_expert_gate"):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)} needs a shared expert; set n_shared_experts to 1")
        for name, size in (("hidden_size", self.hidden_size), ("moe_intermediate_size", self.expert_size)):
            if size % 8:
                raise ValueError(f"{name}={size} is not divisible by 8, which grouped products of experts need")
