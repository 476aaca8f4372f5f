"""Optimizers against their definitions, schedules at points worked out by hand, the router-bias update."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from moe_lm.config.training import OptimizerConfig, ScheduleConfig
from moe_lm.model.transformer import LanguageModel
from moe_lm.optim.groups import (
    build_optimizer,
    build_optimizers,
    schedule_factor,
    set_learning_rate,
    step_on_threads,
    update_router_biases,
)
from moe_lm.optim.muon import Muon
from tests.tiny import random, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2}


# Parameter groups


def names_in(model: nn.Module, group: dict[str, Any]) -> set[str]:
    inside = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "norm_type": "layernorm", "mlp_bias": True}])
@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name: Any, changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    optimizers = build_optimizers(model, OptimizerConfig(name=name, weight_decay=0.3))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    every = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, every)) == sorted(map(id, model.parameters()))
    decay = {name: group["weight_decay"] for group in groups for name in names_in(model, group)}
    assert decay == {
        name: 0.0 if name.endswith(("norm.weight", "bias")) else 0.3 for name, _ in model.named_parameters()
    }


def test_muon_takes_the_hidden_matrices_but_no_router_embedding_or_head() -> None:
    model = tiny_model(**SMALL)
    adamw, muon = build_optimizers(model, OptimizerConfig(name="muon"))
    assert isinstance(muon, Muon)
    taken = {name for group in muon.param_groups for name in names_in(model, group)}
    attention = {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in (0, 1) for part in "qkvo"}
    parts = ("gate_proj", "up_proj", "down_proj")
    dense = {f"model.layers.0.mlp.{part}.weight" for part in parts}
    routed = {f"model.layers.1.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")}
    shared = {f"model.layers.1.mlp.shared_experts.{part}.weight" for part in parts}
    assert taken == attention | dense | routed | shared
    assert "model.layers.1.mlp.gate.weight" in names_in(model, adamw.param_groups[0])


def test_adamw_has_the_gate_of_the_shared_experts_and_tied_embeddings_once() -> None:
    model = tiny_model(shared_expert_gate=True, tie_word_embeddings=True)
    adamw, _ = build_optimizers(model, OptimizerConfig(name="muon"))
    assert "model.layers.1.mlp.shared_expert_gate.weight" in names_in(model, adamw.param_groups[0])
    assert sum(parameter is model.lm_head.weight for parameter in adamw.param_groups[0]["params"]) == 1


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_every_state_exists_before_the_first_step(name: Any) -> None:
    """So that a checkpoint has somewhere to go; the step changes the values, not the names and shapes."""
    model = tiny_model(**SMALL)
    optimizers = build_optimizers(model, OptimizerConfig(name=name))

    def states() -> list[dict[int, dict[str, tuple[torch.Size, torch.dtype]]]]:
        return [
            {id(p): {key: (value.shape, value.dtype) for key, value in state.items()} for p, state in o.state.items()}
            for o in optimizers
        ]

    before = states()
    assert sum(len(state) for state in before) == len(list(model.parameters()))
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = random(*parameter.shape, seed=number)
    for optimizer in optimizers:
        optimizer.step()
    assert states() == before


# AdamW


def test_adamw_is_loshchilov_and_hutters_equation() -> None:
    model = tiny_model(**SMALL)
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    (adamw,) = build_optimizers(model, config)
    moe = "model.layers.1.mlp"
    decays = {f"{moe}.experts.gate_up_proj": 0.1, f"{moe}.gate.weight": 0.1, "model.norm.weight": 0.0}
    parameters = dict(model.named_parameters())
    expected = {name: parameters[name].detach().double().clone() for name in decays}
    first, second = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for t in (1, 2, 3):
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = random(*parameter.shape, seed=100 * t + number)
        for name, decay in decays.items():
            gradient = parameters[name].grad.double()  # type: ignore[union-attr]
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            update = (first[name] / (1 - 0.8**t)) / ((second[name] / (1 - 0.9**t)).sqrt() + 1e-6)
            expected[name] = expected[name] - 0.01 * decay * expected[name] - 0.01 * update
        adamw.step()
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].detach().double(), value, rtol=1e-5, atol=1e-6)


# Schedules


def rates(total: int, *steps: int, **config: Any) -> list[float]:
    return [schedule_factor(step, total, ScheduleConfig(**config)) for step in steps]


@pytest.mark.parametrize("name", ["cosine", "wsd", "multistep", "constant"])
def test_warm_up_rises_in_a_line_and_never_begins_at_0(name: str) -> None:
    assert rates(1000, 0, 1, 3, 4, name=name, warmup_steps=4) == pytest.approx([0.2, 0.4, 0.8, 1.0])


def test_cosine_by_hand() -> None:
    config = {"name": "cosine", "warmup_steps": 10, "min_ratio": 0.1}
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert rates(110, 10, 35, 60, 110, **config) == pytest.approx([1.0, quarter, 0.55, 0.1])
    assert rates(110, 109, **config)[0] > 0.1  # the last step that is taken
    assert rates(5, 4, **config) == pytest.approx([5 / 11])  # all warm-up


def test_warmup_stable_decay_by_hand() -> None:
    config = {"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.2, "min_ratio": 0.1}
    assert rates(100, 9, 10, 80, 90, 99, 100, **config) == pytest.approx([10 / 11, 1, 1, 0.55, 0.145, 0.1])
    assert rates(100, 50, name="wsd", warmup_steps=0, decay_fraction=1.0, min_ratio=0) == pytest.approx([0.5])


def test_multistep_is_deepseeks() -> None:
    """Times 0.316 at 80% and again at 90% (DeepSeek LLM, arXiv 2401.02954, section 2.3): 31.6% and 10%."""
    found = rates(1000, 799, 800, 899, 900, 999, name="multistep", warmup_steps=10)
    assert found == pytest.approx([1, 0.316, 0.316, 0.316**2, 0.316**2])


def test_constant_stays() -> None:
    assert rates(100, 0, 50, 99, name="constant", warmup_steps=0) == [1, 1, 1]


def test_every_group_keeps_its_own_peak() -> None:
    optimizers = build_optimizers(tiny_model(**SMALL), OptimizerConfig(name="muon", lr=0.01, muon_lr=0.2))
    for factor in (0.5, 0.1):
        set_learning_rate(optimizers, factor)
        found = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        assert found == pytest.approx([0.01 * factor, 0.01 * factor, 0.2 * factor, 0.2 * factor])


# Router biases


def biases(model: LanguageModel) -> list[list[float]]:
    return [layer.gate.e_score_correction_bias.tolist() for layer in model.moe_layers]


def test_biases_move_by_the_rate_towards_an_even_load() -> None:
    """DeepSeek-V3, section 2.1.2: down over the mean load (10 here), up under it, by gamma whatever the distance."""
    model = tiny_model(**SMALL)
    [layer] = model.moe_layers
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, 0.0, -0.5]))
    update_router_biases(model, torch.tensor([[11, 10, 0, 19]]), rate=0.25)
    assert biases(model) == [[0.25, 0.0, 0.25, -0.75]]


def test_every_layer_moves_by_its_own_load() -> None:
    model = tiny_model(**SMALL, first_k_dense_replace=0)
    update_router_biases(model, torch.tensor([[1, 2, 3, 2], [4, 0, 0, 0]]), rate=1.0)
    assert biases(model) == [[1, 0, -1, 0], [-1, 1, 1, 1]]


def test_counts_beyond_float32_still_move_biases_the_right_way() -> None:
    """2^25 + 1 is not a float32; a mean of rounded counts would call it even."""
    model = tiny_model(**SMALL)
    update_router_biases(model, torch.tensor([[2**25 + 1, 2**25 - 1, 2**25, 2**25]]), rate=1.0)
    assert biases(model) == [[-1, 1, 0, 0]]


def test_a_step_on_more_threads_gives_the_same_weights() -> None:
    weights = [torch.nn.Parameter(random(100_000, seed=1)) for _ in range(2)]
    optimizers = [build_optimizer("adamw", [{"params": [weight]}], OptimizerConfig()) for weight in weights]
    step_on_threads(optimizers[1], 3)
    seen = []
    optimizers[1].register_step_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for seed in (2, 3):
            weight.grad = random(100_000, seed=seed)
            optimizer.step()
    assert torch.equal(*weights)
    assert (seen, torch.get_num_threads()) == ([3, 3], 1)
