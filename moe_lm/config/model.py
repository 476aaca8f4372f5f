"""The shape of a model, the adapters beside its weights, and what must hold within them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from moe_lm.common.errors import UsageError
from moe_lm.config.section import Section

MOST_LAYERS, MOST_EXPERTS = 1 << 12, 1 << 16  # more are a mistake, or an attempt to keep a reader busy


class RopeScaling(Section):
    """How rotary positions reach beyond the trained length, in Hugging Face's names.

    `linear` divides every frequency by `factor` (arXiv 2306.15595). `llama3` divides only the slow ones, with a ramp
    in between (arXiv 2407.21783). `yarn` has a ramp over rotations and sharpens the attention (arXiv 2309.00071).
    """

    rope_type: Literal["linear", "llama3", "yarn"] = Field(description="method of stretching")
    factor: float = Field(ge=1, description="new length over the trained length")
    original_max_position_embeddings: int | None = Field(default=None, gt=0, description="llama3, yarn: trained length")
    low_freq_factor: float | None = Field(
        default=None, gt=0, description="llama3: wavelengths above the trained length over this are divided in full"
    )
    high_freq_factor: float | None = Field(
        default=None, gt=0, description="llama3: wavelengths below the trained length over this are left as they are"
    )
    beta_fast: float | None = Field(default=None, gt=0, description="yarn: rotations where the ramp begins; null: 32")
    beta_slow: float | None = Field(default=None, gt=0, description="yarn: rotations where the ramp ends; null: 1")
    mscale: float | None = Field(default=None, ge=0, description="yarn: attention scale, as DeepSeek uses it")
    mscale_all_dim: float | None = Field(default=None, ge=0, description="yarn: its divisor, as DeepSeek uses it")
    attention_factor: float | None = Field(default=None, gt=0, description="yarn: attention scale; null: from factor")
    truncate: bool = Field(default=True, description="yarn: the ramp begins and ends at whole dimensions")

    @model_validator(mode="after")
    def _keys_belong_to_the_type(self) -> Self:
        llama3 = {"original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
        needed = {"linear": set(), "llama3": llama3, "yarn": {"original_max_position_embeddings"}}[self.rope_type]
        of_yarn = {"beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"}
        read = {"rope_type", "factor"} | needed | (of_yarn if self.rope_type == "yarn" else set())
        self.require_all(sorted(needed), f"rope_type={self.rope_type}")
        others = [name for name in type(self).model_fields if name not in read]
        self.refuse_any(others, f"has no meaning with rope_type={self.rope_type}; remove it")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise ValueError(f"high_freq_factor={high} is not more than low_freq_factor={low}; raise it")
        return self


class ModelConfig(Section):
    """The shape of a model, in the names of the field's model configs (Hugging Face, DeepSeek).

    The defaults are the DeepSeekMoE form: RMSNorm, rotary positions, QK-norm, SwiGLU, sigmoid router.
    `n_routed_experts: 0` makes every layer dense. `num_experts_per_tok` equal to `n_routed_experts` sends every token
    to every expert. `capacity_factor` makes a layer drop tokens as Switch and GShard do.
    """

    vocab_size: int = Field(gt=0, description="rows of the embedding; at least the tokenizer's ids")
    hidden_size: int = Field(gt=0, description="width of the residual stream")
    num_hidden_layers: int = Field(gt=0, le=MOST_LAYERS, description="number of transformer blocks")
    num_attention_heads: int = Field(gt=0, description="query heads of a layer")
    num_key_value_heads: int | None = Field(default=None, gt=0, description="KV heads (GQA); null: one a query head")
    head_dim: int | None = Field(default=None, gt=0, description="size of a head; null: hidden_size over query heads")
    q_lora_rank: int | None = Field(default=None, gt=0, description="MLA: size of the compressed query")
    kv_lora_rank: int | None = Field(
        default=None, gt=0, description="size of the compressed keys and values; turns on latent attention (MLA)"
    )
    qk_nope_head_dim: int | None = Field(default=None, gt=0, description="MLA: unrotated part of a query or key")
    qk_rope_head_dim: int | None = Field(default=None, gt=0, description="MLA: rotated part of a query or key")
    v_head_dim: int | None = Field(default=None, gt=0, description="MLA: size of a head's values")
    intermediate_size: int = Field(gt=0, description="width of a dense feed-forward layer")
    max_position_embeddings: int = Field(default=4096, gt=0, description="longest sequence, in tokens")

    moe_intermediate_size: int | None = Field(default=None, gt=0, description="expert width; null: intermediate_size")
    n_routed_experts: int = Field(
        default=0, ge=0, le=MOST_EXPERTS, description="routed experts of an MoE layer; 0: a dense model"
    )
    num_experts_per_tok: int = Field(default=2, gt=0, description="routed experts that a token is sent to (top-k)")
    n_shared_experts: int = Field(default=1, ge=0, description="experts that every token of an MoE layer uses")
    shared_expert_intermediate_size: int | None = Field(
        default=None, gt=0, description="width of all shared experts together; null: n_shared_experts times one expert"
    )
    shared_expert_gate: bool = Field(default=False, description="sigmoid gate on the shared experts, as in Qwen2-MoE")
    first_k_dense_replace: int = Field(default=0, ge=0, description="number of first layers that stay dense")
    mlp_only_layers: tuple[int, ...] = Field(default=(), description="further dense layers, counted from 0")
    scoring_func: Literal["sigmoid", "softmax"] = Field(default="sigmoid", description="makes scores of router logits")
    norm_topk_prob: bool = Field(default=True, description="divide the scores of the chosen experts by their sum")
    routed_scaling_factor: float = Field(default=1.0, description="factor on the weights of routed experts")
    n_group: int = Field(default=1, gt=0, description="groups that the routed experts are divided into")
    topk_group: int = Field(default=1, gt=0, description="groups that a token chooses its experts from")
    capacity_factor: float | None = Field(
        default=None, gt=0, description="tokens that an expert takes, over its even share; null: no token is dropped"
    )

    norm_type: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="normalisation before each part")
    rms_norm_eps: float = Field(default=1e-6, gt=0, description="added to the mean square in normalisations")
    hidden_act: Literal["silu", "relu", "gelu"] = Field(default="silu", description="activation of feed-forward layers")
    mlp_gated: bool = Field(default=True, description="gated feed-forward layers (SwiGLU when hidden_act is silu)")
    position_embedding: Literal["rope", "learned", "sinusoidal"] = Field(
        default="rope", description="rotary positions in attention, or positions added to the embedding"
    )
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        default=None,
        description="positions beyond the trained length; `rope_parameters`, as transformers 5 writes it, is read too",
    )
    rope_interleave: bool = Field(default=False, description="rotate neighbouring entries together, not the two halves")
    partial_rotary_factor: float = Field(default=1.0, gt=0, le=1, description="share of a head that is rotated")
    use_qk_norm: bool = Field(default=True, description="RMSNorm on queries and keys")
    qk_norm_over: Literal["head", "projection"] = Field(
        default="head", description="normalise each head, or the projection with all heads together"
    )
    attention_bias: bool = Field(default=False, description="biases of the projections to queries, keys and values")
    attention_out_bias: bool = Field(default=False, description="bias of attention's output projection")
    mlp_bias: bool = Field(default=False, description="biases of dense and shared feed-forward layers, not of experts")
    lm_head_bias: bool = Field(default=False, description="bias of the output layer")
    tie_word_embeddings: bool = Field(default=False, description="the output layer shares the embedding's weights")
    initializer_range: float = Field(default=0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="before")
    @classmethod
    def _read_rope_parameters(cls, values: Any) -> Any:
        return with_rope_parameters(values) if isinstance(values, dict) else values

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
        return routed and layer not in self.mlp_only_layers

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
        self.require_divisor("num_key_value_heads", self.kv_heads, "num_attention_heads")
        self._check_rotary()
        if not self.use_qk_norm:
            self.refuse_any(["qk_norm_over"], "has no meaning with use_qk_norm=False; remove it")
        if self.position_embedding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd; sinusoidal positions need an even size")
        if self.n_routed_experts:
            self._check_routing()
        return self

    def _check_latent(self) -> None:
        sizes = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        if self.kv_lora_rank is None:
            self.refuse_any(("q_lora_rank", *sizes), "needs kv_lora_rank (latent attention); set it")
            return
        latent = f"kv_lora_rank={self.kv_lora_rank} (latent attention)"
        self.require_all(sizes, latent)
        if self.num_key_value_heads != self.num_attention_heads:
            advice = f"set it to {self.num_attention_heads}"
            self.refuse_any(["num_key_value_heads"], f"does not go with {latent}; {advice}")
        if self.use_qk_norm:
            raise ValueError(f"use_qk_norm=True does not go with {latent}; set it to False")
        for name in ("head_dim", "partial_rotary_factor", "position_embedding"):
            default = type(self).model_fields[name].default
            advice = "remove it" if default is None else f"set it to {default}"
            self.refuse_any([name], f"does not go with {latent}; {advice}")

    def _check_rotary(self) -> None:
        if self.position_embedding != "rope":
            rotary = ("rope_scaling", "rope_interleave", "partial_rotary_factor")
            self.refuse_any(rotary, f"has no meaning with position_embedding={self.position_embedding}; remove it")
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
        self.require_at_most("num_experts_per_tok", "n_routed_experts")
        self.require_divisor("n_group", self.n_group, "n_routed_experts")
        self.require_at_most("topk_group", "n_group")
        reachable = self.topk_group * (experts // self.n_group)
        if per_token > reachable:
            raise ValueError(
                f"num_experts_per_tok={per_token} is more than the {reachable} experts that topk_group="
                f"{self.topk_group} of n_group={self.n_group} leave; choose at most {reachable}"
            )
        self.require_at_most("first_k_dense_replace", "num_hidden_layers")
        for layer in self.mlp_only_layers:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"mlp_only_layers={list(self.mlp_only_layers)} names layer {layer}; choose from 0 to "
                    f"{self.num_hidden_layers - 1}"
                )
        if not self.n_shared_experts:
            shared = ("shared_expert_intermediate_size", "shared_expert_gate")
            self.refuse_any(shared, "needs a shared expert; set n_shared_experts to 1")
        for name, size in (("hidden_size", self.hidden_size), ("moe_intermediate_size", self.expert_size)):
            if size % 8:
                raise ValueError(f"{name}={size} is not divisible by 8, which grouped products of experts need")


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), trained in place of the weights that they stand beside."""

    rank: int = Field(default=16, gt=0, description="inner size of an adapter's two factors")
    alpha: float = Field(default=32.0, gt=0, description="an adapter's output is multiplied by alpha / rank")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of an adapter's inputs to leave out; the same ones in a whole step"
    )
    targets: tuple[Literal["attention", "feed_forward", "experts"], ...] | None = Field(
        default=None,
        min_length=1,
        description="layers that get adapters; feed_forward: dense layers and shared experts; null: all of them",
    )


def with_rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """A model's settings with `rope_parameters`, as transformers 5 writes it, as those that it stands for.

    Raises ValueError for one that says something else than a setting beside it.
    """
    if "rope_parameters" not in values:
        return values
    others = {name: value for name, value in values.items() if name != "rope_parameters"}
    rope = values["rope_parameters"]
    if not isinstance(rope, dict):
        raise ValueError(f"rope_parameters={rope!r} is not a section; write {{rope_type: ..., rope_theta: ...}}")
    rope = {name: value for name, value in rope.items() if value is not None}
    meant: dict[str, Any] = {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    kind = rope.pop("rope_type", "default")
    if kind == "default" and rope:
        raise ValueError(
            f"rope_parameters has {', '.join(map(str, rope))} and no rope_type; set it, like rope_type: yarn"
        )
    meant["rope_scaling"] = None if kind == "default" else {"rope_type": kind, **rope}
    for name, value in meant.items():
        if name in others and others[name] != value:
            raise ValueError(f"{name}={others[name]} is not that of rope_parameters, {value}; keep one of them")
    return others | meant


def check_vocabulary(model: ModelConfig, tokenizer_size: int) -> None:
    """Raise UsageError when the tokenizer has ids that the model has no embedding for."""
    if model.vocab_size < tokenizer_size:
        raise UsageError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokenizer_size} ids; "
            f"set model.vocab_size to at least {tokenizer_size}"
        )


def check_targets(model: ModelConfig, lora: LoraConfig | None) -> None:
    """Raise UsageError when `lora` targets weights that the model does not have."""
    there = ["attention"]
    if model.moe_layers:
        there.append("experts")
    if len(model.moe_layers) < model.num_hidden_layers or model.shared_width:
        there.append("feed_forward")
    missing = sorted(set((lora and lora.targets) or ()).difference(there))
    if missing:
        raise UsageError(
            f"lora.targets names {missing[0]}, of which the model has none; choose among {', '.join(there)}"
        )
