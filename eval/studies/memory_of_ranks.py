"""Peak memory of real ranks on this machine beside what the simulated rank says.

    python eval/studies/memory_of_ranks.py --out eval/results/memory_of_ranks.json

Every layout has processes of its own, over gloo, which take two steps of two micro-batches in float32. Counted is the
high-water mark of the second step over what the process held before it built its model (Linux's VmHWM).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.deepspeed_engine import _import_deepspeed
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join
from moe_lm.parallel.topology import Topology, current_topology
from moe_lm.tools.plan.simulate import simulate

LENGTH, ROWS, MICRO_BATCHES = 256, 4, 2
SHAPE = {
    "vocab_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": LENGTH,
    "n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
SIZES = {
    "29M": {"hidden_size": 256, "intermediate_size": 1024, "moe_intermediate_size": 384},
    "115M": {"hidden_size": 512, "intermediate_size": 2048, "moe_intermediate_size": 768},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # the layout that this process is a rank of
    arguments = parser.parse_args()
    if arguments.rank:
        print(json.dumps(peak_here(json.loads(arguments.rank))))
        return
    rows = []
    for world_size, size, stage, recompute in itertools.product(
        arguments.worlds, arguments.sizes, (1, 2, 3), ("none", "full")
    ):
        layout = {"world_size": world_size, "size": size, "zero_stage": stage, "recompute": recompute}
        real = max(measured(layout))
        told = predicted(layout)
        rows.append({**layout, "real_bytes": real, "predicted_bytes": told, "ratio": round(told / real, 3)})
        print(rows[-1], flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"layouts": rows}, indent=1) + "\n", encoding="utf-8")


def configs(layout: dict[str, Any]) -> tuple[ModelConfig, TrainConfig, ParallelConfig]:
    world_size = layout["world_size"]
    train = TrainConfig(
        steps=2,
        global_batch_size=ROWS * MICRO_BATCHES * world_size,
        micro_batch_size=ROWS,
        precision="float32",
        activation_checkpointing=layout["recompute"],
    )
    expert_parallel = min(2, world_size)
    parallel = ParallelConfig(
        device="cpu", engine="deepspeed", expert_parallel_size=expert_parallel, zero_stage=layout["zero_stage"]
    )
    return ModelConfig(**SHAPE | SIZES[layout["size"]]), train, parallel


def predicted(layout: dict[str, Any]) -> int:
    return simulate(*configs(layout), LENGTH, layout["world_size"], device="cpu").memory.peak


def measured(layout: dict[str, Any]) -> list[int]:
    """The peak of every rank, in processes of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--rank", json.dumps(layout)]
    place = {"WORLD_SIZE": str(layout["world_size"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Without it glibc keeps freed memory for later, as much as 32 MiB a tensor, which would count as held.
    limits = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **place, **limits, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(layout["world_size"])
    ]  # fmt: skip
    ends = [rank.communicate() for rank in ranks]
    for rank, (_, errors) in zip(ranks, ends, strict=True):
        if rank.returncode:
            raise SystemExit(errors)
    return [int(output.splitlines()[-1]) for output, _ in ends]


def peak_here(layout: dict[str, Any]) -> int:
    """Bytes of this rank's second step."""
    model, train, parallel = configs(layout)
    topology = current_topology()
    join(Meeting(topology), torch.device("cpu"), parallel.timeout_seconds)
    _warm_up(topology)
    before = status("VmRSS")
    built = build_model(model, parallel, topology)
    built.initialise(train.seed)
    engine = build_engine(built, NextToken(), train, parallel, pad_id=0)
    generator = torch.Generator().manual_seed(topology.rank)
    batches = [_batch(model.vocab_size, generator) for _ in range(MICRO_BATCHES)]
    engine.train_step(0, batches)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark begins anew
    engine.train_step(1, batches)
    return status("VmHWM") - before


def _warm_up(topology: Topology) -> None:
    """Load what every rank loads, and make oneDNN's buffers."""
    _import_deepspeed(topology)
    x = torch.randn(256, 256, requires_grad=True)
    torch.mm(x, x).sum().backward()


def _batch(vocabulary: int, generator: torch.Generator) -> Batch:
    ids = torch.randint(1, vocabulary, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
    return Batch(ids, ids.clone(), (torch.arange(ROWS + 1) * LENGTH).int(), LENGTH)


def status(name: str) -> int:
    """Bytes by a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; this needs Linux")


if __name__ == "__main__":
    main()
