"""Muon: orthogonalisation as it should be, `torch.optim.Muon` on 2-D weights, experts as matrices of their own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from moe_lm.optim.muon import Muon, orthogonalise
from tests.tiny import random

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), (8, 256), (64, 8)])
def test_orthogonalise_brings_singular_values_into_a_band_and_keeps_directions(shape: tuple[int, int]) -> None:
    matrices = random(5, *shape) * torch.logspace(-4, 4, 5)[:, None, None]
    result = orthogonalise(matrices)
    assert result.dtype == torch.float32
    left, singular, right = torch.linalg.svd(matrices, full_matrices=False)
    found = torch.linalg.svdvals(result)
    well = singular / singular[:, :1] > 0.05  # five iterations do not lift what is next to nothing
    assert float(found[well].min()) > 0.6
    assert float(found.max()) < 1.3
    # Near the polar factor U V^T: nearly all of the result lies along it.
    polar = left @ right
    cosine = (result * polar).sum((-2, -1)) / result.norm(dim=(-2, -1)) / polar.norm(dim=(-2, -1))
    assert float(cosine.min()) > 0.95


def test_orthogonalise_of_a_stack_is_that_of_each_matrix() -> None:
    matrices = random(6, 16, 24)
    alone = torch.cat([orthogonalise(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, rtol=0, atol=1e-6)


def test_orthogonalise_of_nothing_is_nothing() -> None:
    """An expert that got no token has a gradient of zeros."""
    matrices = torch.cat([torch.zeros(1, 8, 8), random(1, 8, 8)])
    result = orthogonalise(matrices)
    assert not result[0].any()
    assert result.isfinite().all()


def test_muon_step_is_jordans_and_experts_are_matrices_of_their_own() -> None:
    """A stack [E, in, out] moves as E linear layers [out, in] would; wide and tall shapes are scaled apart."""
    for shape, scale in (((3, 8, 32), math.sqrt(32 / 8)), ((3, 32, 8), 1.0)):
        stacked = nn.Parameter(random(*shape, seed=1))
        layers = [nn.Parameter(expert.detach().T.contiguous()) for expert in stacked]
        start = stacked.detach().clone()
        muon = Muon([stacked, *layers], lr=0.1, momentum=0.9, weight_decay=0.5)
        buffer = torch.zeros_like(start)
        expected = start
        for t in (1, 2):
            gradient = random(*shape, seed=10 * t)
            stacked.grad = gradient.clone()
            for layer, expert in zip(layers, gradient, strict=True):
                layer.grad = expert.T.contiguous()
            muon.step()
            buffer = 0.9 * buffer + 0.1 * gradient
            direction = orthogonalise(0.1 * gradient + 0.9 * buffer)
            expected = expected * (1 - 0.1 * 0.5) - 0.1 * scale * direction
        torch.testing.assert_close(stacked.detach(), expected, rtol=0, atol=1e-6)
        for layer, expert in zip(layers, stacked, strict=True):
            torch.testing.assert_close(layer.detach(), expert.detach().T, rtol=0, atol=1e-6)


SHAPES = [(16, 16), (48, 16), (16, 48)]


def torch_muon(weights: list[nn.Parameter], **settings: float) -> torch.optim.Muon:
    return torch.optim.Muon(weights, nesterov=True, ns_steps=5, adjust_lr_fn="original", **settings)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 1e-4), (torch.float32, 0.02)])
def test_on_2d_weights_it_is_torchs_muon(dtype: torch.dtype, allowed: float) -> None:
    """Five steps, momentum and decay on. torch orthogonalises in bfloat16 everywhere; where this one does too they are
    equal, where it takes float32 they differ by torch's rounding. Relative to how far the weights moved."""
    ours, theirs = ([nn.Parameter(random(*shape, seed=n)) for n, shape in enumerate(SHAPES)] for _ in range(2))
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    optimizers = Muon(ours, **settings, dtype=dtype), torch_muon(theirs, **settings)
    start = [weight.detach().clone() for weight in ours]
    for step in range(5):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            for weight in pair:
                weight.grad = random(*weight.shape, seed=100 * step + number)
        for optimizer in optimizers:
            optimizer.step()
    for before, one, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() <= allowed * moved


def test_a_stack_of_experts_is_torchs_muon_expert_by_expert() -> None:
    """[E, in, out] here, E weights [out, in] there."""
    stack = nn.Parameter(random(3, 16, 48))
    alone = [nn.Parameter(expert.detach().T.clone()) for expert in stack]
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    ours, theirs = Muon([stack], **settings, dtype=torch.bfloat16), torch_muon(alone, **settings)
    start = stack.detach().clone()
    for step in range(5):
        stack.grad = random(3, 16, 48, seed=step)
        for weight, gradient in zip(alone, stack.grad, strict=True):
            weight.grad = gradient.T.clone()
        ours.step()
        theirs.step()
    for before, expert, weight in zip(start, stack, alone, strict=True):
        assert (expert - weight.T).norm() <= 1e-4 * (weight.T - before).norm()


def test_matrices_side_by_side_move_as_they_would_alone() -> None:
    """As gate and up of an expert do, which are one parameter."""
    apart = [nn.Parameter(random(3, 8, 12, seed=seed)) for seed in (1, 2)]
    together = nn.Parameter(torch.cat([part.detach() for part in apart], -1))
    muon = Muon([{"params": apart}, {"params": [together], "matrices": 2}], lr=0.1, momentum=0.9, weight_decay=0.5)
    for step in (1, 2):
        for seed, part in enumerate(apart):
            part.grad = random(*part.shape, seed=10 * step + seed)
        together.grad = torch.cat([random(*part.shape, seed=10 * step + seed) for seed, part in enumerate(apart)], -1)
        muon.step()
    torch.testing.assert_close(together, torch.cat([part.detach() for part in apart], -1), rtol=0, atol=1e-6)
