"""Gradients of a training loss, parameter by parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lm.objective.training_loss import TrainingLoss
from tests import tiny


def gradients(loss: TrainingLoss, *totals: Tensor) -> dict[str, Tensor]:
    """The gradients of the sum of these losses."""
    loss.zero_grad()
    torch.stack(totals).sum().backward()
    return tiny.gradients(loss.model)


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
