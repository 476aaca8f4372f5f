"""Peak memory of ranks that start ZeRO 3, over that of ranks that start the same program with a tiny model.

    python eval/studies/memory_at_start.py --gigabytes 1 4 --out eval/results/memory_at_start.json

Counted is Linux's VmHWM of each of four ranks, over gloo on this machine: when its weights are where they belong, and,
with `--engine`, when the engine around them is built, which adds what training keeps anyway: gradients and moments.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.deepspeed_engine import _import_deepspeed
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join
from moe_lm.parallel.topology import current_topology

RANKS = 4
WIDTH = {"tiny": 16, "whole": 1024}
LAYERS_OF_A_GIGABYTE = 5 / 2  # at width 1024
HERE = Path(__file__).resolve()


class WeightsArePlaced(Exception):  # noqa: N818
    """Ends a start in which only the weights are of interest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--expert-parallel", type=int, default=1)
    parser.add_argument("--engine", action="store_true", help="build the engine too: 16 bytes a parameter in all")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # the model that this process has a share of
    arguments = parser.parse_args()
    if arguments.rank:
        print(json.dumps(peak_here(**json.loads(arguments.rank))))
        return
    rows = [measured(size, arguments.expert_parallel, arguments.engine) for size in arguments.gigabytes]
    if arguments.out:
        arguments.out.write_text(json.dumps({"starts": rows}, indent=1) + "\n", encoding="utf-8")


def measured(gigabytes: float, expert_parallel: int, engine: bool, ranks: int = RANKS) -> dict[str, Any]:
    """What a rank needs for a model of this size over a tiny one, at most, by the point of the start."""
    settings = {"expert_parallel": expert_parallel, "engine": engine}
    empty = run_ranks({"gigabytes": 0.0, **settings}, ranks)
    began = time.perf_counter()
    full = run_ranks({"gigabytes": gigabytes, **settings}, ranks)
    row = {
        "bytes_of_weights": full[0]["weights"], **settings, "ranks": ranks, "seconds": time.perf_counter() - began,
        "placed_over_empty": max(f["placed"] - e["placed"] for f, e in zip(full, empty, strict=True)),
    }  # fmt: skip
    if engine:
        row["built_over_empty"] = max(f["built"] - e["built"] for f, e in zip(full, empty, strict=True))
    print(row, flush=True)
    return row


def run_ranks(model: dict[str, Any], ranks: int) -> list[dict[str, int]]:
    """What each rank reports."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE), "--rank", json.dumps(model)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, **place, "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                 "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit("a rank failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def peak_here(gigabytes: float, expert_parallel: int, engine: bool) -> dict[str, int]:
    """This rank's high-water marks in bytes, and those of the whole model's weights."""
    width = WIDTH["whole" if gigabytes else "tiny"]
    model = ModelConfig(
        vocab_size=2048, hidden_size=width, num_hidden_layers=max(2, round(gigabytes * LAYERS_OF_A_GIGABYTE)),
        num_attention_heads=8, max_position_embeddings=256, n_routed_experts=32, num_experts_per_tok=2,
        moe_intermediate_size=width, intermediate_size=4 * width, first_k_dense_replace=0, n_shared_experts=0,
    )  # fmt: skip
    train = TrainConfig(steps=1, global_batch_size=4, precision="float32")
    parallel = ParallelConfig(device="cpu", engine="deepspeed", zero_stage=3, expert_parallel_size=expert_parallel)
    topology = current_topology()
    join(Meeting(topology), torch.device("cpu"), parallel.timeout_seconds)
    deepspeed = _import_deepspeed(topology)
    initialize, marks = deepspeed.initialize, {}

    def placed(*arguments: Any, **options: Any) -> Any:
        marks["placed"] = peak()
        if not engine:
            raise WeightsArePlaced
        return initialize(*arguments, **options)

    deepspeed.initialize = placed
    try:
        built = build_model(model, parallel, topology)
        built.initialise(train.seed)
        build_engine(built, NextToken(), train, parallel, pad_id=0)
        marks["built"] = peak()
    except WeightsArePlaced:
        pass
    with torch.device("meta"):
        marks["weights"] = sum(parameter.nbytes for parameter in LanguageModel(model).parameters())
    return marks


def peak() -> int:
    """This process's VmHWM in bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text("ascii").splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
