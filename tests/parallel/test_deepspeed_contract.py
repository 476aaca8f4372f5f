"""What moe_lm/parallel/deepspeed_engine.py uses of DeepSpeed's inside; a new DeepSpeed that moves it fails here."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

PINNED = "0.19"
MOVED = (
    f"DeepSpeed's internals moved since {PINNED}: {{}}. See moe_lm/parallel/deepspeed_engine.py; do not raise the pin "
    "in pyproject.toml before `moe-lm verify` passes"
)


def test_the_minor_version_is_the_pinned_one() -> None:
    version = importlib.metadata.version("deepspeed")
    assert version.startswith(f"{PINNED}."), MOVED.format(f"its version is {version}")


def test_the_layer_class_and_the_groups_are_where_they_were() -> None:
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups

    assert callable(split_params_into_different_moe_groups_for_optimizer)
    assert callable(is_moe_param)
    assert "use_data_before_expert_parallel_" in inspect.signature(groups._create_expert_and_data_parallel).parameters
    assert hasattr(AutoEPMoELayer, "set_deepspeed_parallelism"), MOVED.format("AutoEPMoELayer has another interface")


@pytest.mark.parametrize(
    ("module", "owner", "names"),
    [
        (
            "deepspeed.runtime.zero.stage_1_and_2",
            "DeepSpeedZeroOptimizer",
            ("single_partition_of_fp32_groups", "bit16_groups", "_hp_optimizer_states_linked", "update_lp_params"),
        ),
        (
            "deepspeed.runtime.zero.stage3",
            "DeepSpeedZeroOptimizer_Stage3",
            ("fp32_partitioned_groups_flat", "fp16_groups", "_reassign_or_swap_out_partitioned_parameters"),
        ),
        ("deepspeed.runtime.engine", "DeepSpeedEngine", ("was_step_applied", "set_gradient_accumulation_boundary")),
        ("deepspeed.comm.torch", "", ("build_shm_op",)),
    ],
)
def test_the_names_that_the_engine_uses_are_there(module: str, owner: str, names: tuple[str, ...]) -> None:
    imported = importlib.import_module(module)
    source = inspect.getsource(getattr(imported, owner) if owner else imported)
    for name in names:
        assert name in source, MOVED.format(f"{module}.{owner} has no {name}")
