"""Quantile balancing against sorted scores in NumPy, and what it makes of the load."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lm.model.moe import Routing, expert_counts, route
from moe_lm.objective.balance import of_all_layers
from moe_lm.objective.quantile_balance import BINS, needed_biases, set_biases
from tests.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERTS, CHOSEN, TOKENS = 16, 2, 2048
MODEL = {"n_routed_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_hidden_layers": 3}


def skewed(layer: int, step: int = 0) -> Tensor:
    """Logits under which every expert has another share of the tokens."""
    draw = torch.Generator().manual_seed(1000 * layer + step)
    spread = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(layer))
    return torch.randn(TOKENS, EXPERTS, generator=draw) + 0.7 * spread


def routings(model: Any, step: int = 0) -> tuple[Routing, Tensor]:
    """Of all layers, with the biases that the model has."""
    biases = [layer.gate.e_score_correction_bias for layer in model.moe_layers]
    found = [route(skewed(n, step), bias, model.config) for n, bias in enumerate(biases)]
    return of_all_layers(found), torch.stack(biases)


def violation(load: Tensor) -> float:
    return float((load.max(-1).values / load.float().mean(-1) - 1).mean())


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_the_biases_are_the_quantiles_of_what_each_token_needs(scoring_func: str) -> None:
    model = tiny_model(scoring_func=scoring_func, **MODEL)
    start = 0.1 * torch.linspace(-1, 1, EXPERTS)
    for layer in model.moe_layers:
        layer.gate.e_score_correction_bias.copy_(start)
    routing, biases = routings(model)
    counted = torch.arange(TOKENS) % 8 != 0
    set_biases(model, needed_biases(routing, biases, counted))
    for layer, scores in zip(model.moe_layers, routing.scores[:, counted].double().numpy(), strict=True):
        biased = scores + start.double().numpy()
        alpha = np.sort(biased, -1)[:, -CHOSEN - 1, None]
        needed = np.sort(alpha - scores, 0)[CHOSEN * len(scores) // EXPERTS]
        found = layer.gate.e_score_correction_bias.numpy()
        assert abs(found - (needed - needed.mean())).max() < (0.01 if scoring_func == "sigmoid" else 0.002)
        assert abs(found.mean()) < 1e-6


@pytest.mark.parametrize(
    "changes", [{"scoring_func": "sigmoid"}, {"scoring_func": "softmax"}, {"n_group": 4, "topk_group": 2}]
)
def test_in_a_few_steps_the_load_is_even_where_it_was_not(changes: dict[str, Any]) -> None:
    model = tiny_model(**MODEL, **changes)
    seen = []
    for step in range(5):
        routing, biases = routings(model, step)
        seen.append(violation(expert_counts(routing.experts, EXPERTS)))
        set_biases(model, needed_biases(routing, biases, torch.ones(TOKENS, dtype=torch.bool)))
    assert seen[0] > 0.9
    assert max(seen[3:]) < 0.3


def test_counts_add_up_over_parts_of_the_batch_and_rounding_does_not_move_the_biases() -> None:
    model, other = tiny_model(**MODEL), tiny_model(**MODEL)
    routing, biases = routings(model)
    counted = torch.arange(TOKENS) % 5 != 0
    whole = needed_biases(routing, biases, counted)
    assert whole.shape == (len(biases), EXPERTS, BINS)
    assert (whole.sum(-1) == counted.sum()).all()
    halves = [
        needed_biases(Routing(*(tensor[:, rows] for tensor in routing)), biases, counted[rows])
        for rows in (slice(0, 700), slice(700, None))
    ]
    assert torch.equal(halves[0] + halves[1], whole)
    near = routing._replace(scores=routing.scores * (1 + 1e-7))
    set_biases(model, whole)
    set_biases(other, needed_biases(near, biases, counted))
    for one, two in zip(model.moe_layers, other.moe_layers, strict=True):
        assert torch.equal(one.gate.e_score_correction_bias, two.gate.e_score_correction_bias)


def test_memory_keeps_a_share_of_the_old_bias() -> None:
    model, without = tiny_model(**MODEL), tiny_model(**MODEL)
    for one in (model, without):
        one.moe_layers[0].gate.e_score_correction_bias.fill_(1.0)
    routing, biases = routings(model)
    counts = needed_biases(routing, biases, torch.ones(TOKENS, dtype=torch.bool))
    set_biases(without, counts)
    set_biases(model, counts, memory=0.75)
    new = without.moe_layers[0].gate.e_score_correction_bias
    torch.testing.assert_close(model.moe_layers[0].gate.e_score_correction_bias, 0.75 + 0.25 * new)


def test_a_step_of_padding_alone_leaves_the_biases_as_they_are() -> None:
    model = tiny_model(**MODEL)
    bias = model.moe_layers[0].gate.e_score_correction_bias
    bias.copy_(torch.linspace(-0.3, 0.3, len(bias)))
    before = bias.clone()
    routing, biases = routings(model)
    set_biases(model, needed_biases(routing, biases, torch.zeros(TOKENS, dtype=torch.bool)))
    assert torch.equal(bias, before)
