"""The shape of a model and what must hold within it."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from moe_lm.section import Section


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
    intermediate_size: int = Field(gt=0, description="width of a dense feed-forward layer")
    max_position_embeddings: int = Field(default=4096, gt=0)

    moe_intermediate_size: int | None = Field(default=None, gt=0, description="width of one expert")
    n_routed_experts: int = Field(default=0, ge=0)
    num_experts_per_tok: int = Field(default=2, gt=0)
    n_shared_experts: int = Field(default=1, ge=0)
    first_k_dense_replace: int = Field(default=0, ge=0, description="this many first layers stay dense")
    moe_layer_freq: int = Field(default=1, gt=0, description="every n-th layer is MoE, counted as DeepSeek does")
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
    use_qk_norm: bool = True
    attention_bias: bool = Field(default=False, description="bias on the query, key and value projections")
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
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` (counted from 0) has routed experts."""
        routed = self.n_routed_experts > 0 and layer >= self.first_k_dense_replace
        return routed and layer % self.moe_layer_freq == 0

    @property
    def moe_layers(self) -> list[int]:
        return [layer for layer in range(self.num_hidden_layers) if self.is_moe_layer(layer)]

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads="
                f"{self.num_attention_heads}; choose a divisor or set head_dim"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_key_value_heads={self.kv_heads} does not divide num_attention_heads="
                f"{self.num_attention_heads}; choose a divisor"
            )
        if self.position_embedding == "rope" and self.head_size % 2:
            raise ValueError(f"head_dim={self.head_size} is odd; rotary positions need an even head size")
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd; sinusoidal positions need an even size")
        if self.n_routed_experts:
            self._check_routing()
        return self

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
        for name, size in (("hidden_size", self.hidden_size), ("moe_intermediate_size", self.expert_size)):
            if size % 8:
                raise ValueError(f"{name}={size} is not divisible by 8, which grouped products of experts need")
