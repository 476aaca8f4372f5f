"""DeepSpeed's JSON, generated from our one config. Imports no DeepSpeed, so that `--dry-run` can show it."""

from __future__ import annotations

from typing import Any

from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig


def deepspeed_json(train: TrainConfig, parallel: ParallelConfig, world_size: int, cuda: bool) -> dict[str, Any]:
    """The config of `deepspeed.initialize`.

    DeepSpeed's own mixed precision, which rounds every weight, is off: it takes the data types that it finds, bfloat16
    for weights that are multiplied and float32 for all others and for every gradient (deepspeed_engine.py).
    """
    groups = parallel.row_groups(world_size)
    micro = train.rows_at_once(groups)
    accumulated = max(1, train.global_batch_size // groups) // micro
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
    return {
        # Its rows are those that a rank computes: where ranks share rows, parts of ours.
        "train_batch_size": world_size * micro * accumulated,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": train.clip_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, the same as on one device
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
