"""The recipe of every optimizer in configs/ trains: on the tests' text, with a smaller model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from tests.processes import losses

pytestmark = pytest.mark.usefixtures("one_thread")
RECIPES = Path(__file__).parents[2] / "configs" / "pretrain"


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_the_recipe_of_an_optimizer_lowers_the_loss(
    name: str, tiny_pretrain: Path, tmp_path: Path, moe_lm: Callable[..., Any]
) -> None:
    recipe = load_config(PretrainConfig, RECIPES / f"{name}.yaml")
    data = load_config(PretrainConfig, tiny_pretrain).data
    assert recipe.train.optimizer.name == name
    settings = [
        f"run_dir={tmp_path}", f"data.tokenizer={data.tokenizer}", f"data.shards={data.shards}",
        f"data.sources=[{{name: text, path: {data.sources[0].path}}}]", "data.sequence_length=64",
        "model.hidden_size=32", "model.intermediate_size=64", "model.moe_intermediate_size=32",
        "train.steps=8", "train.schedule.warmup_steps=2", "train.precision=float32", "parallel.device=cpu",
    ]  # fmt: skip
    done = moe_lm("pretrain", RECIPES / f"{name}.yaml", *settings)
    assert (done.code, done.err) == (0, "")
    found = losses(tmp_path)
    assert len(found) == 8
    assert found[-1] < found[0] - 0.1
