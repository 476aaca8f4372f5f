"""Random small models of `transformers`, and ours with their weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_lm.config.model import ModelConfig
from moe_lm.kernels import kernels
from moe_lm.model.attention import PackedAttention
from moe_lm.model.moe import all_logical
from moe_lm.model.transformer import LanguageModel
from tests.tiny import gradients

VOCABULARY = 64
Tensors = dict[str, Tensor]


def build(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    return randomised(kind._from_config(config, attn_implementation="eager", experts_implementation="eager"))


def randomised(theirs: nn.Module) -> nn.Module:
    """Weights that keep activations and logits of order 1, so that an absolute difference means something.

    A little smaller, so that rounding stays under 1e-5 with any CPU's kernels, over three layers and 512 tokens.
    """
    generator = torch.Generator().manual_seed(0)
    stored = theirs.state_dict(keep_vars=True)  # without the rotary frequencies, which are buffers too
    with torch.no_grad():
        for name, tensor in stored.items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim >= 2:
                tensor.copy_(noise * 0.7 / tensor.shape[-1] ** 0.5)
            elif name.endswith("bias"):
                tensor.copy_(noise * 0.2)
            elif name.endswith("weight"):
                tensor.copy_(1 + noise * 0.2)
    return theirs.eval()


def in_our_layout(tensors: Tensors) -> Tensors:
    """Names are nearly the same; stacked experts are `[E, in, out]` here and `[E, out, in]`, gate over up, there."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        name = name.replace(".mlp.shared_expert.", ".mlp.shared_experts.").replace(".moe_statics.", ".")
        name = name.replace(".mlp.e_score", ".mlp.gate.e_score")
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                ours[name.replace("gate_up_proj", part)] = half.mT
        elif name.endswith("experts.down_proj"):
            ours[name] = tensor.mT
        else:
            ours[name] = tensor.flatten() if name.endswith("e_score_correction_bias") else tensor
    return ours


def our_model(config: ModelConfig, weights: Tensors) -> LanguageModel:
    """Our model with these weights, in the kernels that it trains in."""
    model = LanguageModel(config)
    kernels.apply(model, kernels.choose(model.device))
    model.initialise(0)  # only for the balance biases that a model without them lacks
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("e_score_correction_bias") for name in missing)
    return model


def rows_apart(rows: int, positions: int) -> tuple[Tensor, PackedAttention]:
    position_ids = torch.arange(positions).expand(rows, -1)
    return position_ids, PackedAttention(torch.arange(rows + 1, dtype=torch.int32) * positions, positions)


def random_tokens(rows: int, positions: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(5))


def assert_same_logits_experts_and_gradients(
    ours: LanguageModel, theirs: PreTrainedModel, tokens: Tensor, layout: Any = in_our_layout
) -> None:
    """Largest absolute difference of logits 1e-5, the same experts, and every weight's next-token gradient."""
    chosen: list[Tensor] = []
    for name, module in theirs.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _module, _inputs, out: chosen.append(out[2]))
    output = ours(tokens, *rows_apart(*tokens.shape))
    expected = theirs(input_ids=tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert len(output.routings) == len(chosen) == len(ours.config.moe_layers)
    for routing, experts in zip(output.routings, chosen, strict=True):
        assert torch.equal(routing.experts.sort().values, experts.sort().values)

    for logits in (output.logits, expected):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found, wanted = gradients(ours), layout(their_gradients(theirs))
    assert found.keys() == wanted.keys() == all_logical(ours.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def their_gradients(model: nn.Module) -> Tensors:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
