"""The moving average of weights that an optimizer keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_lm.config.training import OptimizerConfig
from moe_lm.optim.average import EMA
from moe_lm.optim.groups import build_optimizers
from tests.tiny import tiny_model


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_weights_after_a_step_weigh_less_with_age(name: str) -> None:
    model, decay, steps = tiny_model(), 0.7, 5
    optimizers = build_optimizers(model, OptimizerConfig(name=name, ema_decay=decay, muon_lr=0.1, lr=0.1))
    seen: dict[nn.Parameter, list[torch.Tensor]] = {parameter: [] for parameter in model.parameters()}
    for step in range(steps):
        for parameter in seen:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        for optimizer in optimizers:
            optimizer.step()
        for parameter, past in seen.items():
            past.append(parameter.detach().double().clone())
    shares = torch.tensor([decay**age for age in reversed(range(steps))], dtype=torch.float64)
    shares /= shares.sum()
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            expected = torch.tensordot(shares, torch.stack(seen[parameter]), dims=1)  # type: ignore[index]
            torch.testing.assert_close(state[EMA].double(), expected, rtol=1e-5, atol=1e-6)


def test_without_a_decay_nothing_is_kept() -> None:
    for optimizer in build_optimizers(tiny_model(), OptimizerConfig()):
        assert all(EMA not in state for state in optimizer.state.values())
