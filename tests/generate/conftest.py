"""A run folder with a small model of random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.config.model import ModelConfig
from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(save_run: Callable[..., Path]) -> MakeRun:
    def make(change: Callable[[LanguageModel], object] = lambda model: None, **settings: Any) -> Path:
        values: dict[str, Any] = {
            "vocab_size": 1100,  # more than the tokenizer has
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 64,
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "lm_head_bias": True,
            "initializer_range": 0.3,
        }
        model = LanguageModel(ModelConfig(**values | settings))
        model.initialise(seed=1)
        change(model)
        return save_run(model)

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture
def session(run: Path) -> Session:
    return Session.load(run, device="cpu")
