"""Balance losses against their papers' equations in NumPy, with and without padding, and summed over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_lm.config.model import ModelConfig
from moe_lm.config.training import BalanceConfig
from moe_lm.model.moe import Routing, expert_counts, route
from moe_lm.objective.balance import (
    balance_loss,
    batch_balance_loss,
    of_all_layers,
    router_entropy,
    router_z_loss,
    routing_figures,
    sequence_balance_loss,
)

ROWS, POSITIONS, EXPERTS, PER_TOKEN = 4, 6, 8, 3
TOKENS = ROWS * POSITIONS
Array = np.ndarray[Any, np.dtype[np.float64]]

PADDING = {
    "no_padding": torch.ones(ROWS, POSITIONS, dtype=torch.bool),
    "padding": torch.arange(POSITIONS) < torch.tensor([6, 4, 1, 0])[:, None],  # the last row is all padding
}


def routing_of(scoring_func: Any, logits_TE: Tensor, biased: bool = True, **changes: Any) -> Routing:
    config = ModelConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        n_routed_experts=EXPERTS, num_experts_per_tok=PER_TOKEN, scoring_func=scoring_func, **changes,
    )  # fmt: skip
    bias = torch.linspace(-0.4, 0.4, EXPERTS) * biased
    return route(logits_TE, bias, config)


def random_logits(seed: int = 0) -> Tensor:
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def shares_of(scoring_func: str, logits: Array) -> Array:
    """Affinities normalised over the experts: DeepSeek-V3, equations 15 and 19."""
    scores = 1 / (1 + np.exp(-logits)) if scoring_func == "sigmoid" else np.exp(logits)
    return scores / scores.sum(-1, keepdims=True)


def sequence_loss_reference(scoring_func: str, logits: Array, counted: Array) -> float:
    """DeepSeek-V3, equations 17 to 20 without alpha, one sequence and one expert at a time."""
    total = 0.0
    for row in range(ROWS):
        tokens = [row * POSITIONS + position for position in range(POSITIONS) if counted[row, position]]
        shares = shares_of(scoring_func, logits[tokens])
        for expert in range(EXPERTS):
            among_best = [expert in np.argsort(-share)[:PER_TOKEN] for share in shares]
            fraction = EXPERTS / (PER_TOKEN * len(tokens)) * sum(among_best) if tokens else 0.0
            total += fraction * (shares[:, expert].mean() if tokens else 0.0)
    return total


def batch_loss_reference(scoring_func: str, logits: Array, counted: Array, chosen: Array) -> float:
    """Switch, equations 4 to 6 without alpha, f over the k choices of every token; times the number of tokens."""
    shares, total = shares_of(scoring_func, logits), 0.0
    tokens = [token for token in range(TOKENS) if counted.flat[token]]
    for expert in range(EXPERTS):
        fraction = sum((chosen[token] == expert).sum() for token in tokens) / (PER_TOKEN * len(tokens))
        total += EXPERTS * fraction * shares[tokens, expert].mean()
    return total * len(tokens)


def z_loss_reference(logits: Array, counted: Array) -> float:
    """ST-MoE, equation 5, times the number of tokens."""
    return float(sum(np.log(np.exp(logits[token]).sum()) ** 2 for token in range(TOKENS) if counted.flat[token]))


def assert_equals(loss: Tensor, logits: Tensor, reference: Callable[[Array], float]) -> None:
    """The value of the NumPy equation, and its finite differences in float64 at every logit."""
    (grad,) = torch.autograd.grad(loss, logits)
    base, step = logits.detach().double().numpy(), 1e-6
    assert loss.item() == pytest.approx(reference(base), rel=1e-6)
    slopes = np.zeros_like(base)
    for index in np.ndindex(base.shape):
        up, down = base.copy(), base.copy()
        up[index] += step
        down[index] -= step
        slopes[index] = (reference(up) - reference(down)) / (2 * step)
    np.testing.assert_allclose(grad.numpy(), slopes, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_sequence_balance_loss_equals_its_equations(scoring_func: str, padding: str) -> None:
    logits, counted = random_logits(), PADDING[padding]
    loss = sequence_balance_loss(routing_of(scoring_func, logits), counted)
    assert_equals(loss, logits, lambda values: sequence_loss_reference(scoring_func, values, counted.numpy()))


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_batch_balance_loss_equals_its_equations(scoring_func: str, padding: str) -> None:
    logits, counted = random_logits(), PADDING[padding]
    routing = routing_of(scoring_func, logits)
    loss = batch_balance_loss(routing, counted.flatten(), expert_counts(routing.experts, EXPERTS, counted.flatten()))
    chosen = routing.experts.numpy()
    assert_equals(loss, logits, lambda values: batch_loss_reference(scoring_func, values, counted.numpy(), chosen))


@pytest.mark.parametrize("padding", PADDING)
def test_z_loss_equals_its_equation(padding: str) -> None:
    logits, counted = random_logits(), PADDING[padding]
    loss = router_z_loss(routing_of("sigmoid", logits), counted.flatten())
    assert_equals(loss, logits, lambda values: z_loss_reference(values, counted.numpy()))


def every_term(routing: Routing, counted: Tensor, load: Tensor) -> Tensor:
    """The three losses as they are, without division by the sizes of the batch."""
    weights = BalanceConfig(sequence_loss=1.0, batch_loss=1.0, z_loss=1.0)
    terms = routing_figures(of_all_layers([routing]), counted, weights, load[None]).terms
    return balance_loss(terms, weights, tokens=1, rows=1)


def part_of(routing: Routing, rows: slice) -> Routing:
    tokens = slice(rows.start * POSITIONS, rows.stop * POSITIONS)
    return Routing(*(tensor[tokens] for tensor in routing))


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("size", [1, 2])
def test_losses_of_micro_batches_add_up_to_the_whole_batch(size: int, padding: str) -> None:
    """Values and gradients; the load is the whole batch's in every part."""
    logits, counted = random_logits(), PADDING[padding]
    routing = routing_of("sigmoid", logits)
    load = expert_counts(routing.experts, EXPERTS, counted.flatten())
    whole = every_term(routing, counted, load)
    cuts = [slice(start, start + size) for start in range(0, ROWS, size)]
    parts = torch.stack([every_term(part_of(routing, rows), counted[rows], load) for rows in cuts]).sum()
    torch.testing.assert_close(parts, whole)
    (whole_grad,) = torch.autograd.grad(whole, logits, retain_graph=True)
    (parts_grad,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(parts_grad, whole_grad)


def test_padding_changes_no_loss_and_gets_no_gradient() -> None:
    counted = PADDING["padding"]
    logits, other = random_logits(), random_logits(seed=9).detach()
    changed = torch.where(counted.flatten()[:, None], logits.detach(), other).requires_grad_()
    values, grads = [], []
    for tensor in (logits, changed):
        routing = routing_of("sigmoid", tensor)
        load = expert_counts(routing.experts, EXPERTS, counted.flatten())
        loss = every_term(routing, counted, load)
        values.append(loss.item())
        grads.append(torch.autograd.grad(loss, tensor)[0])
    assert values[0] == values[1]
    assert not grads[0][~counted.flatten()].any()
    assert torch.equal(*grads)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_balance_losses_of_even_scores_are_one_a_row_and_one_a_token(scoring_func: str) -> None:
    """The papers' scale: an even router gives sum_e f_e P_e = 1 a sequence (DeepSeek-V3), E sum f P = 1 (Switch)."""
    routing = routing_of(scoring_func, torch.zeros(TOKENS, EXPERTS))
    counted = PADDING["no_padding"]
    load = expert_counts(routing.experts, EXPERTS)
    assert sequence_balance_loss(routing, counted).item() == pytest.approx(ROWS)
    assert batch_balance_loss(routing, counted.flatten(), load).item() == pytest.approx(TOKENS)


def test_the_sequence_loss_does_not_see_the_bias_or_the_groups() -> None:
    logits = random_logits()
    plain = sequence_balance_loss(routing_of("sigmoid", logits, biased=False), PADDING["padding"])
    grouped = routing_of("sigmoid", logits, biased=True, n_group=4, topk_group=2)
    assert torch.equal(sequence_balance_loss(grouped, PADDING["padding"]), plain)


def test_router_entropy_is_that_of_the_normalised_scores() -> None:
    logits = random_logits()
    for scoring_func in ("sigmoid", "softmax"):
        shares = shares_of(scoring_func, logits.detach().double().numpy())
        expected = -(shares * np.log(shares)).sum(-1).mean()
        assert router_entropy(routing_of(scoring_func, logits)).item() == pytest.approx(expected, rel=1e-6)
    assert router_entropy(routing_of("sigmoid", torch.zeros(TOKENS, EXPERTS))).item() == pytest.approx(np.log(EXPERTS))
