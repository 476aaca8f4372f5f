"""The stack of gate and up, which all but the step itself knows as two tensors."""

from __future__ import annotations

import pytest
import torch

from tests.model.test_moe import moe_config, random_layer


def test_a_state_dict_has_gate_and_up_apart() -> None:
    """The names of checkpoints and exports; in memory the two are one stack, which a state dict shows and fills."""
    one, other = (random_layer(moe_config(), seed=seed).experts for seed in (0, 1))
    tensors = one.state_dict()
    assert list(tensors) == ["gate_proj", "up_proj", "down_proj"]
    gate_up = one.get_parameter("gate_up_proj")
    assert torch.equal(torch.cat((tensors["gate_proj"], tensors["up_proj"]), -1), gate_up)
    tensors["up_proj"].zero_()
    assert not gate_up[..., 16:].any()
    other.load_state_dict(tensors)
    assert torch.equal(other.get_parameter("gate_up_proj"), gate_up)
    del tensors["up_proj"]
    with pytest.raises(RuntimeError, match="up_proj"):
        other.load_state_dict(tensors)
