"""What a model costs, from its config alone: parameters, FLOPs per token, bytes. Imports no torch, builds nothing.

"Active" is what one token passes through: everything but the routed experts, and `num_experts_per_tok` of those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_lm.config.model import ModelConfig

FLOAT32 = 4  # bytes; master weights, gradients and moments are float32


@dataclass(frozen=True)
class Parameters:
    """Parameters by what they are for, all layers together. With tied embeddings the shared matrix counts as `head`."""

    embedding: int  # looked up, never multiplied: token and learned position tables
    attention: int  # the projections
    dense: int  # feed-forward layers without experts
    router: int  # with the gate on the shared experts
    shared: int
    routed: int
    routed_active: int  # the part of `routed` that one token passes through
    head: int
    vectors: int  # norm weights and every bias

    @property
    def total(self) -> int:
        return self.embedding + self.total_non_embedding

    @property
    def active(self) -> int:
        return self.embedding + self.active_non_embedding

    @property
    def total_non_embedding(self) -> int:
        return self.active_non_embedding - self.routed_active + self.routed

    @property
    def active_non_embedding(self) -> int:
        return self.multiplied + self.vectors

    @property
    def multiplied(self) -> int:
        """Entries of all matrices that one token is multiplied with."""
        return self.attention + self.dense + self.router + self.shared + self.routed_active + self.head


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training keeps when nothing is divided over devices."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of `LanguageModel(config)`, exact."""
    layers, sparse = config.num_hidden_layers, len(config.moe_layers)
    hidden = config.hidden_size
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size
    if config.position_embedding == "learned":
        looked_up += config.max_position_embeddings
    matrices = 3 if config.mlp_gated else 2
    expert = matrices * hidden * config.expert_size
    return Parameters(
        embedding=looked_up * hidden,
        attention=layers * _projections(config),
        dense=(layers - sparse) * matrices * hidden * config.intermediate_size,
        router=sparse * (config.n_routed_experts + (1 if config.shared_expert_gate else 0)) * hidden,
        shared=sparse * matrices * hidden * config.shared_width,
        routed=sparse * config.n_routed_experts * expert,
        routed_active=sparse * config.num_experts_per_tok * expert,
        head=config.vocab_size * hidden,
        vectors=_norms(config) + _biases(config),
    )


def flops_per_token(config: ModelConfig, sequence_length: int, causal_half: bool) -> int:
    """Floating-point operations to train on one token, forward and backward, in sequences of `sequence_length`.

    6 for every weight that multiplies the token (attention projections, dense layers, router, shared experts, `k` of
    the routed experts, head) plus the attention scores: 6 x layers x heads x (head size of keys + head size of values)
    x sequence length.
    `causal_half` counts only the half of the scores that a causal mask leaves, as Megatron does; torchtitan and
    OLMo-core count all of them. Embedding look-ups, norms, biases, recomputation and padding do not count.
    """
    width = config.num_attention_heads * (config.head_size + config.value_size)
    scores = config.num_hidden_layers * width * sequence_length
    return 6 * count_parameters(config).multiplied + (3 if causal_half else 6) * scores


class Divided(NamedTuple):
    """A number of parameters or bytes, by how ranks divide them."""

    routed: int  # in stacks of routed experts, which expert parallelism divides
    rest: int


def state_bytes(
    config: ModelConfig,
    optimizer: Literal["adamw", "muon", "lamb"],
    weights: int | None = None,
    trained: int | None = None,
) -> StateBytes:
    """Bytes of weights (with the router's balance biases), and of gradients and moments of what is trained.

    `weights` (bytes) and `trained` (parameters) are by default the whole model's, in float32. AdamW and LAMB keep two
    moments a parameter. Muon keeps one for the matrices that it moves (attention, feed-forward, experts; not embedding,
    router and head), and AdamW has the rest.
    """
    count = count_parameters(config)
    trained = count.total if trained is None else trained
    balance_biases = len(config.moe_layers) * config.n_routed_experts
    moments = 2 * trained
    if optimizer == "muon":
        moments -= count.attention + count.dense + count.shared + count.routed
    return StateBytes(
        weights=(FLOAT32 * count.total if weights is None else weights) + FLOAT32 * balance_biases,
        gradients=FLOAT32 * trained,
        optimizer=FLOAT32 * moments,
    )


def rank_bytes(
    weights: Divided,
    trained: Divided,
    world_size: int,
    expert_parallel_size: int,
    zero_stage: int,
    offload_optimizer: bool,
) -> StateBytes:
    """Bytes that each rank's device keeps under DeepSpeed's AdamW, without activations.

    `weights` are bytes, `trained` parameters. Experts are divided over `expert_parallel_size` ranks, their copies over
    the others. ZeRO divides float32 master weights and moments of what is trained from stage 1 on, gradients from stage
    2, the weights themselves in stage 3; experts over the ranks that keep the same ones, everything else over all.
    """
    ep = expert_parallel_size
    shares = (
        (weights.rest, trained.rest, world_size),
        (weights.routed // ep, trained.routed // ep, world_size // ep),
    )
    kept = gradients = optimizer = 0
    for weight_bytes, parameters, copies in shares:
        kept += weight_bytes // (copies if zero_stage == 3 else 1)
        gradients += FLOAT32 * parameters // (copies if zero_stage >= 2 else 1)
        optimizer += 3 * FLOAT32 * parameters // copies
    return StateBytes(kept, gradients, 0 if offload_optimizer else optimizer)


def _projections(config: ModelConfig) -> int:
    """Entries of the matrices of one attention layer."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_size
    attended = config.num_attention_heads * config.value_size
    if config.kv_lora_rank is None:
        return hidden * (queries + config.kv_heads * (config.head_size + config.value_size) + attended)
    in_queries = hidden * queries if config.q_lora_rank is None else config.q_lora_rank * (hidden + queries)
    latent = hidden * (config.kv_lora_rank + config.rotary_size)
    expanded = config.kv_lora_rank * (queries - config.num_attention_heads * config.rotary_size + attended)
    return in_queries + latent + expanded + attended * hidden


def _norms(config: ModelConfig) -> int:
    residual = config.hidden_size * (2 if config.norm_type == "layernorm" else 1)
    normed = 2 if config.qk_norm_over == "head" else config.num_attention_heads + config.kv_heads
    heads = normed * config.head_size if config.use_qk_norm else 0
    latents = (config.q_lora_rank or 0) + (config.kv_lora_rank or 0)
    return config.num_hidden_layers * (2 * residual + heads + latents) + residual


def _biases(config: ModelConfig) -> int:
    """Routed experts have none, whatever `mlp_bias` says."""
    layers, sparse = config.num_hidden_layers, len(config.moe_layers)
    inward = 2 if config.mlp_gated else 1
    count = config.vocab_size if config.lm_head_bias else 0
    if config.attention_bias:
        if config.kv_lora_rank is None:
            count += layers * config.head_size * (config.num_attention_heads + 2 * config.kv_heads)
        else:
            count += layers * ((config.q_lora_rank or 0) + config.kv_lora_rank + config.rotary_size)
    if config.attention_out_bias:
        count += layers * config.hidden_size
    if config.mlp_bias:
        count += (layers - sparse) * (inward * config.intermediate_size + config.hidden_size)
        if config.shared_width:
            count += sparse * (inward * config.shared_width + config.hidden_size)
    return count
