"""The size of a model: parameters by what they are for, and FLOPs per token. Nothing is allocated.

"Active" is what one token passes through: everything but the routed experts, and `num_experts_per_tok` of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.model.transformer import LanguageModel

PART = {  # of a matrix, by the first of these that its name contains
    "embed_tokens": "embedding",
    "embed_positions": "embedding",
    "lm_head": "head",
    ".self_attn.": "attention",
    ".mlp.experts.": "routed",
    ".mlp.gate.": "router",
    ".mlp.shared_expert_gate.": "router",
    ".mlp.shared_experts.": "shared",
    ".mlp.": "dense",
}


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, all layers together. With tied embeddings the shared matrix counts as `head`."""

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


def on_meta(config: ModelConfig) -> LanguageModel:
    """The model without memory: names, shapes and data types."""
    with torch.device("meta"):
        return LanguageModel(config)


def count_parameters(config: ModelConfig) -> Parameters:
    """Parameters of `LanguageModel(config)`, by the names of its tensors."""
    count = dict.fromkeys((*PART.values(), "vectors"), 0)
    # A tied matrix has two names; the last one, the head's, stays.
    names = {parameter: name for name, parameter in on_meta(config).named_parameters(remove_duplicate=False)}
    for parameter, name in names.items():
        part = next(part for word, part in PART.items() if word in name) if parameter.ndim > 1 else "vectors"
        count[part] += parameter.numel()
    routed_active = count["routed"] * config.num_experts_per_tok // max(1, config.n_routed_experts)
    return Parameters(**count, routed_active=routed_active)


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
