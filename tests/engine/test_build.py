"""What surrounds the model is chosen when the engine is built: the residual stream's data type, CUDA's memory."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig, PretrainConfig
from moe_lm.config.training import PreferenceConfig, TrainConfig
from moe_lm.data.batches import BatchSource
from moe_lm.engine.build import build_loss, build_model
from moe_lm.engine.engine import Engine, StepResult
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.preference import PreferenceObjective
from moe_lm.objective.training_loss import NextToken, Objective, StepCounts
from moe_lm.parallel.topology import Topology
from moe_lm.tools.verify.documents import Pairs
from moe_lm.train import preflight
from tests.tiny import LATENT, engine_of, tiny, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 8


def build_engine(shape: dict[str, Any] | None = None, **changes: Any) -> Engine:
    values = {"steps": 10, "global_batch_size": ROWS, "precision": "float32", "optimizer": {"lr": 0.01}}
    return engine_of(tiny_model(3, **shape or {}), TrainConfig(**values | changes))


def train(engine: Engine, source: BatchSource, steps: int = 3) -> list[StepResult]:
    return [engine.train_step(step, [source.batch(step, range(ROWS))]) for step in range(steps)]


@pytest.mark.parametrize("changes", [{}, {"norm_type": "layernorm"}, LATENT])
def test_the_residual_stream_is_bfloat16_on_request(ragged: BatchSource, changes: dict[str, Any]) -> None:
    """Its sums are rounded; weights, moments and the loss stay float32."""
    wide = build_engine(changes, precision="bfloat16")
    narrow = build_engine(changes, precision="bfloat16", residual_dtype="bfloat16")
    for engine, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
        seen = []
        for block in engine.model.model.layers:
            block.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output[0].dtype))
        engine.evaluate([ragged.batch(5, range(ROWS))])
        assert set(seen) == {dtype}
    for expected, found in zip(train(wide, ragged), train(narrow, ragged), strict=True):
        assert found.loss == pytest.approx(expected.loss, rel=0.01)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=0.1)
    assert {tensor.dtype for name, tensor in narrow.state().items() if name != "random.cpu"} == {torch.float32}


def test_the_residual_stream_is_float32_where_products_are(
    ragged: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lm.engine.build.pick_dtype", lambda precision, device: torch.float32)
    expected = train(build_engine(), ragged, steps=1)
    assert train(build_engine(precision="auto", residual_dtype="bfloat16"), ragged, steps=1)[0].loss == expected[0].loss
    with pytest.raises(ValueError, match="residual_dtype=bfloat16 rounds between products of precision=float32"):
        TrainConfig(steps=1, global_batch_size=1, precision="float32", residual_dtype="bfloat16")


@pytest.mark.parametrize("objective", [NextToken(), PreferenceObjective(PreferenceConfig())], ids=["tokens", "pairs"])
def test_compilation_covers_the_blocks_and_the_loss_of_every_objective(objective: Objective) -> None:
    called: Counter[str] = Counter()

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(*arguments: Any, **named: Any) -> Any:
            called[function.__qualname__] += 1
            return function(*arguments, **named)

        return compiled

    built = build_model(tiny(), ParallelConfig(device="cpu"), Topology())
    built.initialise(seed=3)
    train = TrainConfig(steps=1, global_batch_size=ROWS, compile=True)
    loss = build_loss(built, objective, train, pad_id=2, dtype=torch.float32, compiler=compiler)
    pairs = Pairs(seed=1)
    batch = pairs._pack(0, range(2))
    batch = replace(batch, reference=torch.zeros(batch.num_pairs, 2))
    loss(batch, StepCounts(**loss.count([batch]))).loss.backward()
    assert called == {"Block.forward": 3, "RMSNorm.forward": 1, "routing_figures": 1, "chunk_loss": 1}


@pytest.mark.parametrize("given", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_segments_of_cuda_memory_grow_from_its_first_use_unless_a_person_has_set_them(
    tiny_pretrain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    """A run first uses CUDA when it weighs whether it fits, long before it builds its model."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    found: list[dict[str, str]] = []

    def use(*_: Any, **__: Any) -> Any:
        found.append({name: os.environ[name] for name in names if name in os.environ})
        return SimpleNamespace(total_memory=80 * 2**30)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    for name in ("is_bf16_supported", "get_device_properties", "set_device"):  # each one makes CUDA read its settings
        monkeypatch.setattr(f"torch.cuda.{name}", use)
    monkeypatch.setattr(LanguageModel, "materialise", use)
    config = load_config(
        PretrainConfig, tiny_pretrain, [f"run_dir={tmp_path}", "parallel.device=cuda", "train.precision=auto"]
    )
    preflight.check(config, config.model, Topology())
    build_model(config.model, config.parallel, Topology())
    assert len(found) >= 3
    expected = (
        {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if given is None else {given: "max_split_size_mb:512"}
    )
    assert all(seen == expected for seen in found)
