"""DeepSpeed's JSON is generated from our config."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.deepspeed_config import deepspeed_json

TRAIN = TrainConfig(steps=10, global_batch_size=64, micro_batch_size=4, clip_norm=0.5)


def generated(world_size: int = 8, cuda: bool = False, **parallel: Any) -> dict[str, Any]:
    return deepspeed_json(TRAIN, ParallelConfig(engine="deepspeed", **parallel), world_size, cuda)


def test_batch_sizes_clipping_and_stage_come_from_our_config() -> None:
    found = generated(zero_stage=2)
    assert (found["train_batch_size"], found["train_micro_batch_size_per_gpu"]) == (64, 4)
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == 2
    assert "offload_optimizer" not in found["zero_optimization"]


def test_a_rank_with_fewer_rows_than_a_micro_batch_takes_what_it_has() -> None:
    found = generated(world_size=32)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 1)


def test_ranks_that_share_rows_have_more_of_them() -> None:
    """DeepSpeed takes parts of rows for rows: 64 rows over 2 groups of 4 ranks."""
    found = generated(sequence_parallel_size=4)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (4, 8)
    assert found["train_batch_size"] == 64 * 4


def test_communication_overlaps_on_gpus_alone() -> None:
    assert generated(cuda=True)["zero_optimization"]["overlap_comm"] is True
    assert generated(cuda=False)["zero_optimization"]["overlap_comm"] is False


def test_the_optimizer_can_be_offloaded() -> None:
    found = generated(offload_optimizer=True, cuda=True)["zero_optimization"]["offload_optimizer"]
    assert found == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize("setting", [{"zero_stage": 2}, {"expert_parallel_size": 2}, {"offload_optimizer": True}])
def test_the_torch_engine_ignores_no_setting(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="needs engine=deepspeed"):
        ParallelConfig(**setting)


def test_stage_0_does_not_exist() -> None:
    """With clipping it diverges, and its gradient norm leaves the experts out."""
    with pytest.raises(ValidationError, match="zero_stage"):
        ParallelConfig(engine="deepspeed", zero_stage=0)
