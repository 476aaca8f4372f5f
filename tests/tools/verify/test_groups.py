"""One process that adds up experts by groups, the reference of expert parallelism in bfloat16."""

from __future__ import annotations

import pytest
import torch

from moe_lm.model.moe import Routing, dispatch_locally
from moe_lm.model.transformer import LanguageModel
from moe_lm.tools.verify.groups import DispatchInGroups
from tests.tiny import random, tiny


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_without_rounding_the_groups_change_nothing(groups: int) -> None:
    model = LanguageModel(tiny())
    model.initialise(0)
    layer = model.moe_layers[0]
    found = []
    for dispatcher in (dispatch_locally, DispatchInGroups(groups)):
        x_TD = random(12, model.config.hidden_size, seed=1).requires_grad_()
        routing: Routing = layer.gate(x_TD[None])
        out_TD, shared_TD = dispatcher(x_TD, routing, layer.experts, layer.shared_experts)
        layer.zero_grad()
        out_TD.square().sum().backward()
        gradients = [parameter.grad for parameter in (x_TD, layer.gate.weight, *layer.experts.parameters())]
        found.append((out_TD, shared_TD, *gradients))
    for expected, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, expected, rtol=1e-5, atol=1e-6)


def test_in_bfloat16_each_groups_sum_is_rounded() -> None:
    model = LanguageModel(tiny())
    model.initialise(0)
    layer = model.moe_layers[0].to(torch.bfloat16)
    x_TD = random(64, model.config.hidden_size, seed=1).bfloat16()
    routing = layer.gate(x_TD[None])
    one, _ = DispatchInGroups(1)(x_TD, routing, layer.experts, None)
    assert torch.equal(one, dispatch_locally(x_TD, routing, layer.experts, None)[0])
    assert not torch.equal(one, DispatchInGroups(2)(x_TD, routing, layer.experts, None)[0])
