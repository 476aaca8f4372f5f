"""DeepSpeed's JSON, generated from our one config. Imports no DeepSpeed, so that `--dry-run` can show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_lm.common.errors import UsageError
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig

# What `parallel.deepspeed` may add. Everything else is either generated here, wrong with this engine, or not of use.
PASSED_THROUGH = (
    "zero_optimization", "prescale_gradients", "gradient_predivide_factor", "wall_clock_breakdown", "memory_breakdown",
    "comms_logger", "flops_profiler", "dump_state",
)  # fmt: skip
# The generated keys, and the setting of ours that decides them.
GENERATED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "activation_checkpointing": "train.activation_checkpointing",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
}
# Modes that were found wrong, or that DeepSpeed refuses for expert parameters only after the model is built.
REFUSED = {
    "fp16": "float16 needs loss scaling, which this trainer does not do; set train.precision=bfloat16",
    "communication_data_type": "gradients would be rounded on their way and differ from those of one process",
    "zero_optimization.compute_grad_norm": "the gradient's norm is what clipping and the log need",
    "zero_optimization.zero_quantized_gradients": "gradients of experts would be quantised over the wrong group",
    "zero_optimization.zero_quantized_weights": "weights would differ from those of one process",
    "zero_optimization.zero_hpz_partition_size": "DeepSpeed keeps no secondary copies of expert parameters",
    "zero_optimization.offload_param": "checkpoints read parameters from the device; use expert parallelism instead",
    "zero_optimization.reduce_scatter": "expert gradients need it to be on",
    "zero_optimization.contiguous_gradients": "expert gradients need it to be on",
    "zero_optimization.round_robin_gradients": "its order of parameters is not the checkpoint's",
}


def deepspeed_json(train: TrainConfig, parallel: ParallelConfig, world_size: int, cuda: bool) -> dict[str, Any]:
    """The config of `deepspeed.initialize`. Raises UsageError for a key of `parallel.deepspeed` that cannot stand.

    Weights are float32 and products bfloat16 under autocast, in every layout, so DeepSpeed's own mixed precision,
    which rounds the weights that are multiplied, is off.
    """
    micro = train.rows_at_once(world_size)
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage or 1,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": cuda,  # hides the reduction behind the backward pass; on a CPU there is nothing to overlap
        "reduce_bucket_size": 50_000_000,  # elements; large enough for the network, small beside the model
        "allgather_bucket_size": 50_000_000,
    }
    if parallel.zero_stage == 3:
        zero |= {"stage3_param_persistence_threshold": 10_000, "stage3_prefetch_bucket_size": 50_000_000}
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    generated = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, train.global_batch_size // world_size) // micro,
        "gradient_clipping": train.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, the same as on one device
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    return _merged(generated, parallel.deepspeed)


def _merged(generated: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in extra.items():
        names = [f"{key}.{inner}" for inner in value] if key == "zero_optimization" else [key]
        for name in names:
            if name in GENERATED:
                raise UsageError(f"parallel.deepspeed.{name} is decided by {GENERATED[name]}; set that instead")
            if name in REFUSED:
                raise UsageError(f"parallel.deepspeed.{name} is refused: {REFUSED[name]}; take it away")
        if key not in PASSED_THROUGH:
            raise UsageError(
                f"parallel.deepspeed.{key} is not one of the keys that are passed on: {', '.join(PASSED_THROUGH)}"
            )
    merged = {**generated, **extra}
    merged["zero_optimization"] = {**generated["zero_optimization"], **extra.get("zero_optimization", {})}
    return merged
