"""What a save in the background costs the steps that it overlaps: real training of two ranks on the CPU, in turns.

    python eval/bench/background_save.py [--rounds N] [--output eval/results/background_save.json]

A round is a few steps alone, and then a save and the steps until all ranks have written it, in DeepSpeed's ZeRO 2 with
two expert-parallel ranks. On a CPU the writer hashes and writes on the very cores that train. A step counts as
overlapped if the save was under way when it began; their median is set against that of the steps alone. What the copy
takes, while training waits, is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eval.bench.expert_parallel import HOUSE, RANKS, start_ranks
from moe_lm.checkpoint.saver import Saver
from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import CheckpointConfig, ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import pack
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.logical import piece_of
from moe_lm.parallel.topology import current_topology

ROWS, LENGTH = 2, 512  # of all ranks, tokens of a row
STEPS_ALONE = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(start_ranks())
    load_at_start = os.getloadavg()[0]
    engine = build()
    shared: list[str | None] = [None]
    with TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        result = measure(engine, Path(str(shared[0])), arguments.rounds)
        dist.barrier()
    result |= {
        "date": date.today().isoformat(),
        "load_average": [round(load_at_start, 2), round(os.getloadavg()[0], 2)],
    }
    if engine.topology.is_main:
        print(json.dumps(result, indent=2))
        if arguments.output is not None:
            arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    engine.close()


def build() -> Engine:
    shape = load_config(ModelConfig, HOUSE / "configs/model/anchor-20m.yaml")
    train = TrainConfig(steps=1000, global_batch_size=ROWS, precision="float32")
    parallel = ParallelConfig(engine="deepspeed", expert_parallel_size=RANKS, zero_stage=2)
    built = build_model(shape, parallel, current_topology())
    built.initialise(seed=0)
    return build_engine(built, NextToken(), train, parallel, pad_id=shape.vocab_size)


def measure(engine: Engine, folder: Path, rounds: int) -> dict[str, Any]:
    rows = ROWS // RANKS
    tokens = np.random.default_rng(engine.topology.rank).integers(0, 4096, (rows, LENGTH + 1))
    batch = pack(tokens[:, :-1], tokens[:, 1:].copy(), np.arange(0, rows * LENGTH + 1, LENGTH))

    def step() -> float:
        started = time.perf_counter()
        engine.train_step(0, [batch])
        return time.perf_counter() - started

    alone, overlapped, copying, saving = [], list[float](), list[float](), list[float]()
    with Saver(folder, CheckpointConfig(background=True, keep=1)) as saver:
        for number in range(rounds + 1):
            os.sync()
            dist.barrier()
            apart = [step() for _ in range(STEPS_ALONE)]
            started = time.perf_counter()
            saver.start(number, engine.state(), {})
            copied, beside = time.perf_counter() - started, list[float]()
            while True:
                beside.append(step())
                if not engine.any_rank(saver.is_saving):
                    break
            saver.wait()
            assert all(saved.folder is not None for saved in saver.outcomes())
            if number:
                alone += apart
                overlapped += beside
                copying.append(copied)
                saving.append(saver.longest_save or 0.0)
    state_bytes = sum(view.nbytes for kept in engine.state().values() for view in piece_of(kept).views)
    medians = statistics.median(alone), statistics.median(overlapped)
    return {
        "shape": "configs/model/anchor-20m.yaml",
        "ranks": RANKS,
        "cores": os.cpu_count(),
        "megabytes_a_rank": round(state_bytes / 1e6),
        "milliseconds_of_a_step_alone": round(1e3 * medians[0], 1),
        "milliseconds_of_an_overlapped_step": round(1e3 * medians[1], 1),
        "slower_by_percent": round(100 * (medians[1] / medians[0] - 1), 1),
        "steps": {"alone": len(alone), "overlapped": len(overlapped)},
        "milliseconds_of_the_copy": round(1e3 * statistics.median(copying), 1),
        "seconds_of_the_longest_save": round(max(saving), 2),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
