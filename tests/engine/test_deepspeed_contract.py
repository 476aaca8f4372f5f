"""DeepSpeed's internals that engine/deepspeed_engine.py and deepspeed_zero.py use; one that moves them fails here."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from typing import Any

import pytest

PINNED = "0.19"
MOVED = (
    f"DeepSpeed's internals moved since {PINNED}: {{}}. See moe_lm/engine/deepspeed_engine.py; do not raise the pin "
    "in pyproject.toml before `moe-lm verify` passes"
)
FUNCTIONS = (
    "deepspeed:initialize",
    "deepspeed:init_distributed",
    "deepspeed.comm.torch:build_shm_op",
    "deepspeed.module_inject.auto_ep_layer:AutoEPMoELayer.set_deepspeed_parallelism",
    "deepspeed.moe.utils:split_params_into_different_moe_groups_for_optimizer",
    "deepspeed.runtime.engine:DeepSpeedEngine.backward",
    "deepspeed.runtime.engine:DeepSpeedEngine.destroy",
    "deepspeed.runtime.engine:DeepSpeedEngine.get_global_grad_norm",
    "deepspeed.runtime.engine:DeepSpeedEngine.set_gradient_accumulation_boundary",
    "deepspeed.runtime.engine:DeepSpeedEngine.was_step_applied",
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
    "deepspeed.runtime.zero.stage3:defragment",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state",
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.update_lp_params",
    "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
    "deepspeed.utils:groups._create_expert_and_data_parallel",
    "deepspeed.utils:groups._get_expert_data_parallel_group",
    "deepspeed.utils:safe_get_full_fp32_param",
    "deepspeed.utils:safe_get_full_grad",
    "deepspeed.utils:safe_get_full_optimizer_state",
    "deepspeed.utils:safe_set_full_optimizer_state",
)
# Attributes that exist only in objects, as the source of a class or module shows.
ATTRIBUTES = (
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.single_partition_of_fp32_groups\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.bit16_groups\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\._hp_optimizer_states_linked\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.cpu_offload\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.cpu_offload_pin_memory\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.grad_position\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.param_dict\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.partition_size\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.round_robin_bit16_offsets\b"),
    ("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer", r"self\.real_dp_process_group\b"),
    *(
        (f"deepspeed.runtime.zero.{stage}._optimizer_step", r"self\.optimizer\.step\(\)|optimizer\.step\(\)")
        for stage in ("stage_1_and_2:DeepSpeedZeroOptimizer", "stage3:DeepSpeedZeroOptimizer_Stage3")
    ),
    (
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.async_accumulate_grad_in_cpu_via_gpu",
        r"if param_id not in self\.accumulated_grads_in_cpu:",
    ),
    *(
        (
            f"deepspeed.runtime.zero.{stage}.__init__",
            r"self\.dtype = self\.optimizer\.param_groups\[0\]\['params'\]\[0\]\.dtype",
        )
        for stage in ("stage_1_and_2:DeepSpeedZeroOptimizer", "stage3:DeepSpeedZeroOptimizer_Stage3")
    ),
    ("deepspeed.runtime.zero.stage3", r"self\.lp_param_buffer = defragment\(parameter_partitions\)"),
    ("deepspeed.runtime.zero.stage3", r"append\(self\.lp_param_buffer\.narrow\(0, offset, sub_group_numel\)\)"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", r"self\.fp32_partitioned_groups_flat\b"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", r"self\.fp16_groups\b"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", r"self\.sub_group_to_group_id\b"),
    ("deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3", r"self\.sub_group_process_groups\b"),
    *(
        (f"deepspeed.runtime.zero.{stage}", r"self\._update_scale\(self\.overflow\)\s[^=]*if self\.overflow:")
        for stage in (
            "stage_1_and_2:DeepSpeedZeroOptimizer.step",
            "stage3:DeepSpeedZeroOptimizer_Stage3._loss_scale_update_and_overflow_cleanup",
        )
    ),
    ("deepspeed.runtime.zero.partition_parameters", r"self\._convert_to_zero_parameters\(module\.parameters"),
    (
        "deepspeed.runtime.zero.partition_parameters",
        r"ds_process_group = getattr\(param, \"ds_zero_partition_process_group",
    ),
    ("deepspeed.runtime.zero.partition_parameters", r"param\.ds_zero_partition_world_size = dist\.get_world_size"),
    ("deepspeed.runtime.zero.partition_parameters", r"one_dim_param\.narrow\(0, start, partition_size\)"),
    ("deepspeed.runtime.zero.partition_parameters", r"param\.ds_id\b"),
    ("deepspeed.runtime.zero.partition_parameters", r"param\.ds_shape\b"),
    ("deepspeed.runtime.zero.partition_parameters", r"param\.partition_numel = partition_numel"),
    ("deepspeed.moe.utils", r"param\.group_name\b"),
    ("deepspeed.moe.utils", r"\ballreduce\b"),
    ("deepspeed.runtime.zero.stage3", r"\bds_zero_placement_family\b"),
    ("deepspeed.runtime.zero.stage3", r"\bds_zero_partition_group_name\b"),
)


def test_the_minor_version_is_the_pinned_one() -> None:
    version = importlib.metadata.version("deepspeed")
    assert version.startswith(f"{PINNED}."), MOVED.format(f"its version is {version}")


@pytest.mark.parametrize("place", FUNCTIONS)
def test_what_the_engine_calls_is_there(place: str) -> None:
    found(place)


@pytest.mark.parametrize(("place", "attribute"), ATTRIBUTES)
def test_what_the_engine_reads_and_writes_is_there(place: str, attribute: str) -> None:
    code = "\n".join(line.partition("#")[0] for line in inspect.getsource(found(place)).splitlines())
    assert re.search(attribute, code), MOVED.format(f"{place} has no {attribute}")


def test_groups_of_experts_are_made_as_before() -> None:
    parameters = inspect.signature(found("deepspeed.utils:groups._create_expert_and_data_parallel")).parameters
    assert "use_data_before_expert_parallel_" in parameters, MOVED.format(f"groups are made from {list(parameters)}")


def found(place: str) -> Any:
    """`module:attribute.path` as an object."""
    module, _, path = place.partition(":")
    try:
        item = importlib.import_module(module)
        for name in filter(None, path.split(".")):
            item = getattr(item, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(MOVED.format(f"{place} is not there ({error})"))
    return item
