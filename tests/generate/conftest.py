"""A run folder with a small model of random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.generate.session import Session
from moe_lm.model.transformer import LanguageModel
from tests.tiny import tiny_model

MakeRun = Callable[..., Path]
WRITER: dict[str, Any] = {  # changes of the tiny config
    "vocab_size": 1100,  # more than the tokenizer has
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "lm_head_bias": True,
    "initializer_range": 0.3,  # far from uniform, so that no two tokens are nearly equal
}


@pytest.fixture
def make_run(save_run: Callable[..., Path]) -> MakeRun:
    def make(change: Callable[[LanguageModel], object] = lambda model: None, **settings: Any) -> Path:
        model = tiny_model(**WRITER | settings)
        change(model)
        return save_run(model)

    return make


@pytest.fixture
def run(make_run: MakeRun) -> Path:
    return make_run()


@pytest.fixture
def session(run: Path) -> Session:
    return Session.load(run, device="cpu")
