"""Compiled decoding gives the tokens of decoding that is not compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_lm.generate.decode import Decoder, Settings
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.device import compiling_needs
from moe_lm.model.transformer import LanguageModel
from moe_lm.model_config import ModelConfig

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "use_qk_norm": False,
}  # fmt: skip
PROMPTS = [3, 1, 11, 6, 2]


def written(model: LanguageModel, sampling: Sampling, compiled: bool) -> dict[int, list[Any]]:
    """Tokens and experts of every request: more of them than slots, a prompt in pieces, ends at different steps."""
    decoder = Decoder(model, slots=3, capacity=40, prefill_tokens=8, compiled=compiled)
    generator = torch.Generator().manual_seed(0)
    for seed, length in enumerate(PROMPTS):
        prompt = torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist()
        decoder.add(prompt, Settings(6 + 2 * seed, sampling, seed=seed, routing=True))
    found: dict[int, list[Any]] = {}
    for step in decoder.run():
        found.setdefault(step.request, []).append((step.token, step.experts))
    return found


@pytest.mark.skipif(compiling_needs(torch.device("cpu")) is not None, reason="torch.compile lacks something here")
@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_compiled_equals_not_compiled(attention: dict[str, Any]) -> None:
    model = LanguageModel(ModelConfig(**SHAPE, **attention))
    model.initialise(0)
    for sampling in (GREEDY, Sampling(temperature=1.0, top_p=0.9)):
        assert written(model, sampling, compiled=True) == written(model, sampling, compiled=False)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", [GROUPED, LATENT], ids=["grouped", "latent"])
def test_cuda_graphs_equal_single_kernels(attention: dict[str, Any]) -> None:
    model = LanguageModel(ModelConfig(**SHAPE, **attention))
    model.initialise(0)
    model.cuda()
    for sampling in (GREEDY, Sampling(temperature=1.0, top_p=0.9)):
        assert written(model, sampling, compiled=True) == written(model, sampling, compiled=False)
