"""Adapters: a layer with one is `W + scale * B A` spelled out, whatever computes it, and merging it changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, check_targets
from moe_lm.engine.frozen import left_to_base
from moe_lm.kernels import kernels
from moe_lm.model import lora
from moe_lm.model.attention import PackedAttention
from moe_lm.model.lora import LoraExperts, LoraLinear
from moe_lm.model.moe import Experts, all_logical
from moe_lm.model.transformer import LanguageModel
from tests.tiny import LATENT, tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ("attention", "experts", "feed_forward")


def adapted_model(settings: LoraConfig, **changes: Any) -> LanguageModel:
    """A model whose adapters do something: B is not zero, as it is at the start."""
    model = tiny_model(**changes)
    lora.freeze(model, settings, None)
    kernels.apply(model, kernels.choose(model.device))
    lora.initialise_adapters(model, 1)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if name.endswith("lora_B"):
                factor.copy_(torch.randn(factor.shape, generator=draw) * 0.2)
    return model


def logits(model: LanguageModel) -> Tensor:
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(3))
    output: Tensor = model(ids, torch.arange(20).expand(2, 20), PackedAttention(torch.tensor([0, 20, 40]).int(), 20))[0]
    return output


def merged_copy(model: LanguageModel, settings: LoraConfig) -> LanguageModel:
    """The same model without adapters, its weights merged."""
    plain = LanguageModel(model.config)
    tensors = model.state_dict()
    plain.load_state_dict({name: tensor for name, tensor in tensors.items() if not lora.is_factor(name)})
    with torch.no_grad():
        for name, weight in all_logical(plain.named_parameters()).items():
            lora_A, lora_B = map(tensors.get, lora.factors_of(name))
            if lora_A is not None and lora_B is not None:
                lora.merge(weight, lora_A, lora_B, lora.scale(settings))
    return plain


def filled(module: nn.Module, seed: int = 4) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)


# What a layer computes


def test_a_linear_layer_is_the_sum_of_both_in_float64() -> None:
    layer = nn.Linear(24, 40).double()
    layer.__class__ = LoraLinear
    layer.adapt(LoraConfig(rank=5, alpha=7.0))
    filled(layer)
    x = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    W, b, A, B = (p.detach().numpy() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    np.testing.assert_allclose(layer(x).detach().numpy(), x.numpy() @ (W + 7 / 5 * B @ A).T + b, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("kernel", ["plain", "bucketed"])
def test_experts_are_the_dense_form_token_by_token_and_so_are_their_gradients(rank: int, kernel: str) -> None:
    """Also with an expert that gets no token, and where no gradient is asked for, which other code computes."""
    experts = Experts(tiny()).double()
    experts.__class__ = LoraExperts
    experts.adapt(LoraConfig(rank=rank, alpha=3.0))
    experts.grouped_mm = kernels.EXPERTS[kernel]
    filled(experts)
    counts = [3, 0, 70, 1, 2, 5, 1, 9]
    ends = torch.tensor(counts).cumsum(0).int()
    x = torch.randn(sum(counts), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    weights_R = torch.rand(sum(counts), generator=torch.Generator().manual_seed(4))

    tensors = all_logical(experts.named_parameters())
    dense = {
        name: tensors[name] + 3 / rank * tensors[f"{name}_lora_A"] @ tensors[f"{name}_lora_B"]
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    pieces = [
        (F.silu(rows @ dense["gate_proj"][e]) * (rows @ dense["up_proj"][e])) @ dense["down_proj"][e]
        for e, rows in enumerate(x.split(counts))
    ]
    expected, found = torch.cat(pieces) * weights_R[:, None], experts(x, ends, weights_R)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-8)
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    parameters = dict(experts.named_parameters())
    ours = torch.autograd.grad((found * weight).sum(), list(parameters.values()))
    theirs = torch.autograd.grad((expected * weight).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")

    with torch.no_grad():
        found = experts.float()(x.float(), ends, weights_R)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-2)


def test_a_linear_layer_is_pefts() -> None:
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear as PeftLinear

    layer = nn.Linear(24, 40)
    theirs = PeftLinear(nn.Linear(24, 40), "default", r=4, lora_alpha=9, config=PeftConfig(r=4, lora_alpha=9))
    layer.__class__ = LoraLinear
    layer.adapt(LoraConfig(rank=4, alpha=9.0))
    filled(layer)
    with torch.no_grad():
        theirs.base_layer.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), theirs(x))


# What a model has


@pytest.mark.parametrize("targets", [None, ("attention",), ("feed_forward",), ("experts",), ("attention", "experts")])
def test_every_factor_of_the_targets_and_nothing_else_is_trained(targets: tuple[str, ...] | None) -> None:
    settings = LoraConfig.model_validate({"rank": 4, "targets": targets})
    model = adapted_model(settings)
    logits(model).square().sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
    kinds = {"self_attn": "attention", "mlp.experts": "experts", "mlp": "feed_forward"}
    expected = set()
    for name, parameter in all_logical(LanguageModel(model.config).named_parameters()).items():
        kind = next((kinds[part] for part in kinds if f".{part}." in name), None)
        if kind in (targets or ALL) and parameter.ndim >= 2 and ".gate." not in name:
            expected |= set(lora.factors_of(name))
    assert trained == expected


def test_the_router_is_trained_when_asked() -> None:
    settings = LoraConfig(rank=4, targets=("attention",))
    for asked, trained in ((None, False), (True, False), (False, True)):
        model = LanguageModel(tiny())
        lora.freeze(model, settings, asked)
        assert [layer.gate.weight.requires_grad for layer in model.moe_layers] == [trained] * 2
        assert ("model.layers.1.mlp.gate.weight" in left_to_base(model)) != trained
    model = LanguageModel(tiny())
    lora.freeze(model, None, True)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
        f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)
    }
    assert left_to_base(model) == frozenset()


def test_at_the_start_an_adapter_does_nothing() -> None:
    model = tiny_model()
    before = logits(model)
    lora.freeze(model, LoraConfig(), None)
    lora.initialise_adapters(model, 1)
    assert torch.equal(logits(model), before)


def test_factors_are_drawn_by_seed_name_and_expert() -> None:
    """A rank that keeps experts 4 to 7 draws what one process draws for these."""
    model = adapted_model(LoraConfig(rank=4))
    factors = {name: p.clone() for name, p in model.named_parameters() if lora.is_factor(name) and name[-1] == "A"}
    part = adapted_model(LoraConfig(rank=4))
    for layer in part.moe_layers:
        for name, stack in list(layer.experts.named_parameters()):
            setattr(layer.experts, name, nn.Parameter(stack.detach()[4:].clone()))
    lora.initialise_adapters(part, 1, first_expert=4)
    for name, parameter in part.named_parameters():
        if name in factors:
            expected = factors[name][4:] if ".experts." in name else factors[name]
            assert torch.equal(parameter, expected)
            inputs = expected.shape[1]
            assert expected.abs().max().item() <= 1 / math.sqrt(inputs)
            assert expected.abs().mean().item() == pytest.approx(0.5 / math.sqrt(inputs), rel=0.2)
    assert len({tensor.flatten()[0].item() for tensor in factors.values()}) == len(factors)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_gated": False},
        LATENT | {"shared_expert_gate": True},
    ],
)
def test_merged_is_unmerged(changes: dict[str, Any]) -> None:
    settings = LoraConfig(rank=6, alpha=4.0)
    model = adapted_model(settings, **changes)
    plain = merged_copy(model, settings)
    with torch.no_grad():
        found, expected = logits(plain), logits(model)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - expected).abs().max() < 1e-5


# Dropout


def test_dropout_leaves_out_inputs_for_a_step_and_none_in_evaluation() -> None:
    settings = LoraConfig(rank=4, dropout=0.25)
    model = adapted_model(settings)
    undisturbed = logits(model.eval())
    lora.draw_dropout(model, seed=1, step=7)
    assert torch.equal(logits(model), undisturbed)
    model.train()
    disturbed = logits(model)
    assert not torch.allclose(disturbed, undisturbed)
    assert torch.equal(logits(model), disturbed)

    reference = adapted_model(settings)
    for (name, module), other in zip(model.named_modules(), reference.modules(), strict=True):
        if isinstance(module, LoraLinear):
            assert module.mask_D is not None
            other.lora_A.data *= module.mask_D
        elif isinstance(module, LoraExperts):
            for stack, mask_ED in module.masks_ED.items():
                getattr(other, f"{stack}_lora_A").data *= mask_ED[..., None]
                assert mask_ED.unique().tolist() == pytest.approx([0, 4 / 3]), name
                assert (mask_ED == 0).float().mean() == pytest.approx(0.25, abs=0.12)
                assert not torch.equal(mask_ED[0], mask_ED[1])
    torch.testing.assert_close(logits(reference), disturbed)
    lora.draw_dropout(model, seed=1, step=8)
    assert not torch.allclose(logits(model), disturbed)
    lora.draw_dropout(model, seed=1, step=7)
    assert torch.equal(logits(model), disturbed)


# What cannot be


@pytest.mark.parametrize(
    ("changes", "target"),
    [({"n_routed_experts": 0}, "experts"), ({"n_shared_experts": 0, "first_k_dense_replace": 0}, "feed_forward")],
)
def test_a_target_that_matches_nothing_is_refused(changes: dict[str, Any], target: str) -> None:
    model = tiny(**changes)
    settings = LoraConfig.model_validate({"targets": ["attention", target]})
    with pytest.raises(UsageError, match=f"lora.targets names {target}, of which the model has none; choose among"):
        check_targets(model, settings)
    check_targets(model, LoraConfig())
