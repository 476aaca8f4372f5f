"""Rotary positions against complex numbers and against `transformers`, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lm.model.rotary import Rotary, rotate
from tests.tiny import tiny

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn_deepseek": {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn_mscale_alone": {**YARN, "mscale": 0.707},
    "yarn_given": {**YARN, "attention_factor": 1.1, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn_steep": {**YARN, "beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
}


@pytest.mark.parametrize("interleave", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rotation_is_multiplication_by_a_unit_complex_number(interleave: bool, share: float) -> None:
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 0, 90, 2, 1]])
    angles = Rotary(tiny(head_dim=8, rope_theta=100.0, partial_rotary_factor=share)).angles(positions)
    size = int(8 * share)
    rotated, rest = x.double().split([size, 8 - size], dim=-1)
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if interleave else rotated.chunk(2, dim=-1)
    frequencies = 100.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    unit = torch.polar(torch.ones(1, dtype=torch.float64), positions[..., None, None] * frequencies)
    expected = torch.complex(first, second) * unit
    turned = rotate(x, *angles, interleave).double()
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag, rest), -1), rtol=1e-4, atol=1e-5)


def test_rotated_products_depend_only_on_the_distance() -> None:
    rotary = Rotary(tiny(head_dim=16))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def product(query_position: int, key_position: int) -> float:
        at = [rotary.angles(torch.tensor([[position]])) for position in (query_position, key_position)]
        return (rotate(q, *at[0]) * rotate(k, *at[1])).sum().item()

    assert product(9, 5) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(9, 5) != pytest.approx(product(9, 1), abs=1e-2)


@pytest.mark.parametrize(("head_size", "theta"), [(64, 10_000.0), (128, 1_000_000.0)])
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotary_angles_are_transformers_angles_to_the_bit_at_any_position(
    scaling: str, share: float, head_size: int, theta: float
) -> None:
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

    given = SCALINGS[scaling]
    rope = {**(given or {"rope_type": "default"}), "rope_theta": theta, "partial_rotary_factor": share}
    theirs = Glm4MoeConfig(head_dim=head_size, rope_parameters=rope, max_position_embeddings=163_840)
    positions = torch.tensor([[0, 1, 511, 4095, 131_071]])
    expected_cos, expected_sin = Glm4MoeRotaryEmbedding(theirs)(torch.zeros(1), positions)
    ours = tiny(head_dim=head_size, rope_theta=theta, partial_rotary_factor=share, rope_scaling=given)
    cos, sin = Rotary(ours).angles(positions)
    assert torch.equal(cos[..., 0, :], expected_cos[..., : cos.shape[-1]])
    assert torch.equal(sin[..., 0, :], expected_sin[..., : sin.shape[-1]])
