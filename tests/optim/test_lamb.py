"""LAMB against Algorithm 2 of its paper (arXiv 1904.00962), in NumPy and float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from moe_lm.optim.lamb import Lamb
from tests.tiny import random

pytestmark = pytest.mark.usefixtures("one_thread")
LR, BETA1, BETA2, EPS, DECAY = 0.02, 0.8, 0.95, 1e-6, 0.1


def lamb(*groups: dict[str, Any]) -> Lamb:
    return Lamb(list(groups), LR, (BETA1, BETA2), EPS)


def numpy_lamb(x: NDArray[np.float64], gradients: list[NDArray[np.float64]], decay: float) -> NDArray[np.float64]:
    """One layer of Algorithm 2, phi the identity; a vector has no ratio."""
    first, second = np.zeros_like(x), np.zeros_like(x)
    for t, gradient in enumerate(gradients, 1):
        first = BETA1 * first + (1 - BETA1) * gradient
        second = BETA2 * second + (1 - BETA2) * gradient**2
        ratio = first / (1 - BETA1**t) / (np.sqrt(second / (1 - BETA2**t)) + EPS)
        update = ratio + decay * x
        trust = np.linalg.norm(x) / np.linalg.norm(update) if x.ndim == 2 else 1.0
        x = x - LR * trust * update
    return x


def steps(optimizer: Lamb, parameters: list[nn.Parameter], number: int = 4) -> list[list[NDArray[np.float64]]]:
    """Random gradients of very different sizes; those of every parameter."""
    gradients: list[list[NDArray[np.float64]]] = [[] for _ in parameters]
    for step in range(number):
        for place, parameter in enumerate(parameters):
            parameter.grad = random(*parameter.shape, seed=10 * step + place) * 10.0 ** (place - step)
            gradients[place].append(parameter.grad.double().numpy())
        optimizer.step()
    return gradients


def test_a_matrix_and_a_vector_move_as_the_paper_says() -> None:
    matrix, vector = nn.Parameter(random(12, 20)), nn.Parameter(random(7))
    start = [parameter.detach().double().numpy().copy() for parameter in (matrix, vector)]
    optimizer = lamb({"params": [matrix], "weight_decay": DECAY}, {"params": [vector], "weight_decay": 0.0})
    gradients = steps(optimizer, [matrix, vector])
    np.testing.assert_allclose(matrix.detach(), numpy_lamb(start[0], gradients[0], DECAY), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vector.detach(), numpy_lamb(start[1], gradients[1], 0.0), rtol=1e-5, atol=1e-6)


def test_every_expert_of_a_stack_has_a_ratio_of_its_own() -> None:
    """Experts of very different norms move as the same matrices would alone."""
    stack = nn.Parameter(random(3, 8, 12) * torch.tensor([0.1, 1.0, 10.0])[:, None, None])
    start = stack.detach().double().numpy().copy()
    gradients = steps(lamb({"params": [stack], "weight_decay": DECAY}), [stack])[0]
    for expert, before in enumerate(start):
        expected = numpy_lamb(before, [gradient[expert] for gradient in gradients], DECAY)
        np.testing.assert_allclose(stack[expert].detach(), expected, rtol=1e-5, atol=1e-6)


def test_a_matrix_moves_by_its_own_norm_whatever_the_gradient() -> None:
    for size in (1e-3, 1.0, 1e3):
        matrix = nn.Parameter(random(16, 16))
        before = matrix.detach().clone()
        matrix.grad = random(16, 16, seed=1) * size
        lamb({"params": [matrix], "weight_decay": DECAY}).step()
        moved = (matrix.detach() - before).norm() / before.norm()
        assert float(moved) == pytest.approx(LR, rel=1e-4)


def test_zeros_can_leave_and_an_expert_without_tokens_decays_as_under_adamw() -> None:
    stack = nn.Parameter(torch.cat([torch.zeros(1, 8, 8), random(1, 8, 8)]))
    before = stack.detach().clone()
    stack.grad = torch.cat([random(1, 8, 8, seed=1), torch.zeros(1, 8, 8)])
    lamb({"params": [stack], "weight_decay": DECAY}).step()
    torch.testing.assert_close(stack[0].detach(), -LR * stack.grad[0].sign(), rtol=1e-4, atol=0)
    torch.testing.assert_close(stack[1].detach(), before[1] * (1 - LR * DECAY))


def test_matrices_side_by_side_have_a_ratio_each() -> None:
    """As gate and up of an expert have, which are one parameter: here of very different norms."""
    apart = [nn.Parameter(random(3, 8, 12, seed=seed) * 10.0**seed) for seed in (0, 1)]
    together = nn.Parameter(torch.cat([part.detach() for part in apart], -1))
    optimizer = lamb({"params": apart}, {"params": [together], "matrices": 2})
    for step in (1, 2):
        for seed, part in enumerate(apart):
            part.grad = random(*part.shape, seed=10 * step + seed)
        together.grad = torch.cat([random(*part.shape, seed=10 * step + seed) for seed, part in enumerate(apart)], -1)
        optimizer.step()
    torch.testing.assert_close(together, torch.cat([part.detach() for part in apart], -1), rtol=1e-6, atol=1e-6)
