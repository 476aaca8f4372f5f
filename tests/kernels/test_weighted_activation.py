"""The experts' activation that keeps its inputs alone, against its equation in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.kernels.grouped_mm import BLOCK, SLOPES, kept_narrow, kept_narrow_in_blocks
from moe_lm.model.moe import WeightedActivation, weighted_activation
from tests.tiny import random

Activation = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of the largest entry: bfloat16 rounds once, at the end


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", SLOPES)
@pytest.mark.parametrize("kernel", [kept_narrow, kept_narrow_in_blocks])
@pytest.mark.parametrize("rows", [0, 5, BLOCK + 3])
def test_it_is_the_equation_and_so_are_its_gradients(
    kernel: WeightedActivation, rows: int, activation: Activation, gated: bool, dtype: torch.dtype
) -> None:
    wide = random(rows, 12 if gated else 6, seed=1).to(dtype).requires_grad_()
    weights, grad = random(rows, seed=2).requires_grad_(), random(rows, 6, seed=3).to(dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (wide, weights)]
    out, expected = kernel(wide, weights, activation, gated), weighted_activation(*exact, activation, gated)
    found = (out, *torch.autograd.grad(out, (wide, weights), grad))
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    assert [tensor.dtype for tensor in found] == [dtype, dtype, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        size = float(other.detach().abs().max()) if rows else 0.0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=TOLERANCE[dtype] * size)


def test_only_the_first_product_and_the_weights_are_kept() -> None:
    wide, weights = random(9, 12).bfloat16().requires_grad_(), random(9).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept_narrow(wide, weights, F.silu, True)
    assert {tensor.data_ptr() for tensor in kept} == {wide.data_ptr(), weights.data_ptr()}


def test_a_compiled_one_is_the_equation() -> None:
    compiled = torch.compile(kept_narrow, backend="aot_eager", fullgraph=True)
    wide, weights = random(9, 12).requires_grad_(), random(9).requires_grad_()
    found, expected = (f(wide, weights, F.silu, True) for f in (compiled, weighted_activation))
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(out.square().sum(), (wide, weights)) for out in (found, expected))
    torch.testing.assert_close(*grads)
