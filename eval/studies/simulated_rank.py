"""What a rank of a cluster holds, moves, launches and waits for, without a cluster: the layouts of docs/measured.md.

    python eval/studies/simulated_rank.py --out eval/results/simulated_after.json

eval/results/simulated_before.json holds the same figures of commit 645018e, before the step was rebuilt for GPUs,
taken with the same instrument.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.tools.plan.devices import find_device
from moe_lm.tools.plan.predict import mfu, step_time
from moe_lm.tools.plan.simulate import simulate
from moe_lm.tools.plan.trace import PASSES, Trace

CONFIGS = Path(__file__).parents[2] / "configs"
ACCUMULATED = 8  # micro-batches of a step
GPU = "h100"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="that the figures are of")
    arguments = parser.parse_args()
    cases = {}
    for name, case in settings():
        print(name, flush=True)
        cases[name] = figures(case)
    report = {"commit": arguments.commit, "gpu": GPU, "cases": cases}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """The layouts by name, as arguments of `simulate`."""
    large = model_of("deepseekmoe-16b")
    parallel = ParallelConfig(engine="deepspeed", expert_parallel_size=8, zero_stage=1)
    kinds = [*itertools.product(("none", "selective", "full"), (False, True), ("float32",))]
    kinds.append(("selective", True, "bfloat16"))
    for world_size, rows, (recompute, compiled, residual) in itertools.product((8, 64), (1, 2), kinds):
        train = TrainConfig(
            steps=1,
            global_batch_size=world_size * rows * ACCUMULATED,
            micro_batch_size=rows,
            precision="bfloat16",
            compile=compiled,
            activation_checkpointing=recompute,
            residual_dtype=residual,
        )
        name = f"16B, EP 8 of {world_size}, ZeRO 1, {rows} x 4096, recompute {recompute}"
        name += ", compiled" * compiled + ", residual bfloat16" * (residual == "bfloat16")
        yield name, setting(large, train, parallel, 4096, world_size)
    recipe = yaml.safe_load((CONFIGS / "pretrain" / "deepseekmoe-2b.yaml").read_text(encoding="utf-8"))["train"]
    for world_size in (1, 16):
        train = TrainConfig(**recipe | {"precision": "bfloat16"})
        name = f"the 2B recipe, DDP of {world_size}, 8 x 2048"
        yield name, setting(model_of("deepseekmoe-2b"), train, ParallelConfig(), 2048, world_size)


def setting(
    model: ModelConfig, train: TrainConfig, parallel: ParallelConfig, row_length: int, world_size: int
) -> dict[str, Any]:
    return {
        "model": model,
        "train": train,
        "parallel": parallel,
        "row_length": row_length,
        "world_size": world_size,
    }


def model_of(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def figures(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes, counts and seconds; `a_micro_batch` is everything but the update."""
    trace = simulate(**case)
    device = find_device(GPU)
    time = step_time(trace, device)
    rate = trace.tokens * trace.micro_batches / time.seconds
    shares = [mfu(case["model"], case["row_length"], half, rate, 1, device.peak) for half in (False, True)]
    inside = [during for during in PASSES if during != "update"]
    work = trace.of(inside)
    return {
        "memory": asdict(trace.memory),
        "a_micro_batch": {
            "tokens": trace.tokens,
            "flops": {kind: work.flops(kind) for kind in ("dense", "grouped", "attention")},
            "bytes_outside_products": work.bytes,
            "launches": work.launches,
            "host_syncs": sum(sync.times for sync in trace.syncs if sync.during in inside),
            "hidden_syncs": sum(sync.times for sync in trace.syncs if sync.during in inside and not sync.expected),
            "all_to_all_bytes": exchanged(trace),
        },
        "by_pass_and_part": {
            f"{during}, {part}": {"flops": found.flops(), "bytes": found.bytes, "launches": found.launches}
            for (during, part), found in trace.work.items()
        },
        "findings": sorted({f"{finding.kind}: {finding.where}" for finding in trace.findings}),
        "predicted": {
            "step_seconds": time.seconds,
            "tokens_per_second": rate,
            "mfu": shares[0],
            "mfu_causal_half": shares[1],
            "seconds_by_cause": time.by_cause(),
        },
    }


def exchanged(trace: Trace) -> int:
    """Bytes that a rank sends to the others' experts and gets back, in a micro-batch."""
    sent = (found.bytes * found.times for found in trace.collectives if found.kind == "all_to_all")
    return sum(sent) // trace.micro_batches


if __name__ == "__main__":
    main()
