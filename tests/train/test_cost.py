"""Memory per device: what is kept whole, and what expert parallelism and ZeRO divide."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig
from moe_lm.kernels.rounding import narrow_trained
from moe_lm.model.size import count_parameters, on_meta
from moe_lm.train.cost import Memory, divided_memory, whole_memory
from tests.tiny import LATENT, tiny


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_expert_gate": True, "mlp_bias": True, "position_embedding": "learned"},
        {"tie_word_embeddings": True, "n_routed_experts": 0},
        LATENT,
    ],
)
def test_a_device_keeps_weights_buffers_gradients_and_moments(changes: dict[str, Any]) -> None:
    model = on_meta(tiny(**changes))
    held = [*model.parameters(), *model.buffers()]
    matrices = [
        weight
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not any(part in name for part in ("embed", "lm_head", "gate.weight"))
    ]
    adamw, muon, lamb = (whole_memory(model, OptimizerConfig(name=name)) for name in ("adamw", "muon", "lamb"))
    assert lamb == adamw
    averaging = whole_memory(model, OptimizerConfig(name="muon", ema_decay=0.99))
    assert averaging == replace(muon, optimizer=muon.optimizer + muon.gradients)
    assert adamw.weights == muon.weights == sum(tensor.nbytes for tensor in held)
    assert adamw.gradients == muon.gradients == sum(weight.nbytes for weight in model.parameters())
    assert adamw.optimizer == 2 * adamw.gradients
    assert muon.optimizer == adamw.optimizer - sum(weight.nbytes for weight in matrices)
    assert adamw.total == adamw.weights + adamw.gradients + adamw.optimizer


def test_bfloat16_adds_copies_on_one_device_and_halves_the_weights_under_deepspeed() -> None:
    model = on_meta(tiny())
    multiplied = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and not name.endswith(("embed_tokens.weight", "gate.weight"))
    )
    whole = whole_memory(model, OptimizerConfig())
    assert whole_memory(on_meta(tiny()), OptimizerConfig(), torch.bfloat16) == replace(
        whole, weights=whole.weights + 2 * multiplied
    )
    layout = ParallelConfig(engine="deepspeed")
    wide = divided_memory(dict(model.named_parameters()), layout, 2, OptimizerConfig())
    narrow_trained(model, torch.bfloat16)
    narrow = divided_memory(dict(model.named_parameters()), layout, 2, OptimizerConfig())
    assert narrow == replace(wide, weights=wide.weights - 2 * multiplied)


def test_a_rank_keeps_its_experts_and_its_share_of_what_zero_divides() -> None:
    config = tiny()
    parameters = dict(on_meta(config).named_parameters())
    count = count_parameters(config)
    rest, experts = count.total - count.routed, count.routed // 4

    def memory(world_size: int, ep: int, stage: int, offload: bool = False) -> Memory:
        layout = {"expert_parallel_size": ep, "zero_stage": stage, "offload_optimizer": offload}
        return divided_memory(parameters, ParallelConfig(engine="deepspeed", **layout), world_size, OptimizerConfig())

    assert memory(1, 1, 1) == Memory(4 * count.total, 4 * count.total, 12 * count.total)
    first = Memory(4 * (rest + experts), 4 * (rest + experts), 12 * rest // 8 + 12 * experts // 2)
    assert memory(8, 4, 1) == first
    second = Memory(first.weights, 4 * rest // 8 + 4 * experts // 2, 0)
    assert memory(8, 4, 2, offload=True) == second
    assert memory(8, 4, 3) == Memory(second.gradients, second.gradients, first.optimizer)
