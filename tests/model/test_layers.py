"""Norms, feed-forward layers and positions against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moe_lm.model.layers import MLP, RMSNorm, build_norm, sinusoidal_positions
from tests.tiny import tiny


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = randomised(RMSNorm(8, 1e-3))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    exact = x.double().numpy()
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * norm.weight.detach().double().numpy()
    np.testing.assert_allclose(norm(x).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_keeps_the_data_type_and_computes_in_float32() -> None:
    norm = randomised(RMSNorm(8, 1e-6))
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, norm(x.float()).bfloat16())


@pytest.mark.parametrize(("kind", "built"), [("rmsnorm", RMSNorm), ("layernorm", torch.nn.LayerNorm)])
def test_the_residual_norm_is_the_one_asked_for(kind: str, built: type) -> None:
    norm = build_norm(tiny(norm_type=kind, rms_norm_eps=0.25))
    assert isinstance(norm, built)
    assert norm.eps == 0.25


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["silu", "relu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_is_its_formula(gated: bool, kind: str, bias: bool) -> None:
    mlp = randomised(MLP(tiny(hidden_size=8, mlp_gated=gated, hidden_act=kind, mlp_bias=bias), 12))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    activations = {
        "silu": lambda z: z / (1 + torch.exp(-z)),
        "relu": lambda z: z.clamp(min=0),
        "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    }
    up = x @ mlp.up_proj.weight.T + (mlp.up_proj.bias if bias else 0)
    if gated:
        hidden = activations[kind](x @ mlp.gate_proj.weight.T + (mlp.gate_proj.bias if bias else 0)) * up
    else:
        hidden = activations[kind](up)
    expected = hidden @ mlp.down_proj.weight.T + (mlp.down_proj.bias if bias else 0)
    torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


def test_sinusoidal_positions_are_those_of_the_paper() -> None:
    """arXiv 1706.03762, section 3.5: sin(pos / 10000^(2i/D)) on entry 2i, the cosine on 2i + 1."""
    vectors = sinusoidal_positions(torch.tensor([[0, 3, 50]]), 6)
    for place, position in enumerate((0, 3, 50)):
        for pair in range(3):
            angle = position / 10_000 ** (2 * pair / 6)
            assert vectors[0, place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert vectors[0, place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
