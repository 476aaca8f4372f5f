"""Frozen weights in the precision of their products: every number stays."""

from __future__ import annotations

import pytest
import torch

from moe_lm.config.model import LoraConfig
from moe_lm.engine.frozen import narrow_frozen
from moe_lm.model.lora import is_factor
from tests.model.test_lora import adapted_model, logits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_narrow_frozen_weights_change_no_number_under_autocast() -> None:
    wide, narrow = adapted_model(LoraConfig(rank=4)), adapted_model(LoraConfig(rank=4))
    narrow_frozen(narrow, torch.bfloat16)
    results = []
    for model in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            out = logits(model).float()
        out.square().mean().backward()
        results.append((out, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (out, grads), (narrow_out, narrow_grads) = results
    assert torch.equal(out, narrow_out)
    assert all(torch.equal(grad, narrow_grads[name]) for name, grad in grads.items())
    dtypes = {name: p.dtype for name, p in narrow.named_parameters()}
    assert dtypes["model.layers.1.mlp.experts.gate_up_proj"] == dtypes["lm_head.weight"] == torch.bfloat16
    kept = ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight")
    assert {dtypes[name] for name in (*kept, *(name for name in dtypes if is_factor(name)))} == {torch.float32}


def test_tied_embeddings_are_looked_up_in_float32() -> None:
    model = adapted_model(LoraConfig(rank=4), tie_word_embeddings=True)
    narrow_frozen(model, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.float32
