"""The weights of step 0: routers that prefer one expert and avoid another, and adapters that have an effect."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_lm.data.batches import Batch
from moe_lm.engine.build import RankModel
from moe_lm.model.attention import PackedAttention, segment_positions
from moe_lm.model.drawing import fill_normal
from moe_lm.model.moe import Router
from moe_lm.tools.verify.scale import AVOIDED, FAVOURED, PAD

# What the favoured expert gets at first: so many times the mean of all experts, and at most this share of the tokens.
LOAD, MOST = 3.0, 0.9
HATED = -100.0
ADAPTED = 0.1  # standard deviation of the second factors of adapters


@torch.no_grad()
def initialise(built: RankModel, seed: int, biases: Sequence[float]) -> None:
    """Fill the weights of step 0; `biases` are those of the favoured expert, layer by layer. Adapters have an effect.

    An adapter's second factor is usually zero at first, which would leave its first factor without a gradient.
    """
    built.initialise(seed)
    built.initialise_adapters(seed)

    def adapt(name: str, rows: Tensor, first: int) -> None:
        if name.endswith("lora_B"):
            fill_normal(rows, ADAPTED, f"{seed}/{name}", first * rows[0].numel())

    built.fill(adapt)
    for layer, bias in zip(built.model.moe_layers, biases, strict=True):
        layer.gate.e_score_correction_bias[FAVOURED] = bias
        layer.gate.e_score_correction_bias[AVOIDED] = HATED


@torch.no_grad()
def favouring_biases(built: RankModel, seed: int, batch: Batch) -> list[float]:
    """The smallest biases with which the favoured expert of every layer is the fullest, on the tokens of a batch.

    They depend on seed and routing: a fixed one overwhelms a softmax and hardly moves a sigmoid. `built`, a model in
    one process, is filled to find them; the bias of a layer is set before the next layer reads its output.
    """
    layers = built.model.moe_layers
    initialise(built, seed, [0.0] * len(layers))
    counted = (batch.input_ids != PAD).flatten()
    for layer in layers:
        layer.gate.register_forward_pre_hook(lambda gate, arguments: _favour(gate, arguments[0], counted))
    positions_BS = segment_positions(batch.cu_seqlens, batch.input_ids.shape)
    built.model(batch.input_ids, positions_BS, PackedAttention(batch.cu_seqlens, batch.max_seqlen))
    return [float(layer.gate.e_score_correction_bias[FAVOURED]) for layer in layers]


def _favour(gate: Router, x_BSD: Tensor, counted: Tensor) -> None:
    """Bisect the bias of the favoured expert."""
    config, bias = gate.config, gate.e_score_correction_bias
    wanted = min(MOST, LOAD * config.num_experts_per_tok / config.n_routed_experts)
    low, high = 0.0, 2.0  # scores are below 1, and a group's are at most two of them
    for _ in range(20):
        bias[FAVOURED] = (low + high) / 2
        chosen = (gate.choose(x_BSD).experts == FAVOURED).any(-1)[counted].float().mean()
        low, high = (low, float(bias[FAVOURED])) if chosen >= wanted else (float(bias[FAVOURED]), high)
    bias[FAVOURED] = high
