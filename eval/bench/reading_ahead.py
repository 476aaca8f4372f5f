"""What a slow source costs a training step of about 100 ms on this CPU: read in the step, and read ahead.

The steps are real ones of a small MoE; a read takes 50 ms more, asleep, as behind a network. Turns of the three follow
each other, so that what else runs here touches all alike. `python eval/bench/reading_ahead.py [--turns N] [--out FILE]`
prints medians over the steps, and over the turns of their ratio to the fast source.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import Topology
from moe_lm.train.ahead import Ahead

ROWS, LENGTH, VOCABULARY = 4, 128, 2048
READ_SECONDS = 0.05
STEPS_A_TURN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = small_engine()
    contenders: dict[str, Callable[[], list[Step]]] = {
        "fast source, read ahead": lambda: read_ahead(engine, fast),
        "slow source, read ahead": lambda: read_ahead(engine, slow),
        "slow source, read in the step": lambda: timed(engine, slow),
    }
    turns: dict[str, list[list[Step]]] = {name: [] for name in contenders}
    for number in range(1 + arguments.turns):
        for name, contender in contenders.items():
            found = contender()
            if number:  # the first turn warms up
                turns[name].append(found)
    base = [statistics.median(step.seconds for step in turn) for turn in turns["fast source, read ahead"]]
    result = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "read_seconds": READ_SECONDS,
        "turns": arguments.turns,
        "steps_a_turn": STEPS_A_TURN,
        "medians": {name: figures(turns[name], base) for name in contenders},
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


class Step(NamedTuple):
    """Seconds of a step; of them, those in which it waited for its batch; processor seconds of the process."""

    seconds: float
    waited: float
    cpu_seconds: float


def figures(turns: Sequence[Sequence[Step]], base: Sequence[float]) -> dict[str, float]:
    medians = {name: statistics.median(getattr(step, name) for turn in turns for step in turn) for name in Step._fields}
    ratios = [statistics.median(step.seconds for step in turn) / one for turn, one in zip(turns, base, strict=True)]
    return {**medians, "ratio_to_fast_source": statistics.median(ratios)}


def small_engine() -> Engine:
    model = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256,
        moe_intermediate_size=64, n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1,
    )  # fmt: skip
    train = TrainConfig(steps=10**6, global_batch_size=ROWS, precision="float32")
    parallel = ParallelConfig(device="cpu")
    built = build_model(model, parallel, Topology())
    built.initialise(seed=0)
    return build_engine(built, NextToken(), train, parallel, pad_id=0)


def fast(step: int) -> list[Batch]:
    ids = torch.randint(1, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step)).int()
    bounds = torch.arange(0, ROWS * LENGTH + 1, LENGTH, dtype=torch.int32)
    return [Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), bounds, LENGTH)]


def slow(step: int) -> list[Batch]:
    time.sleep(READ_SECONDS)
    return fast(step)


def read_ahead(engine: Engine, read: Callable[[int], list[Batch]]) -> list[Step]:
    with Ahead(read, torch.device("cpu")) as ahead:
        return timed(engine, lambda step: ahead.take(step, last=STEPS_A_TURN).micro_batches)


def timed(engine: Engine, take: Callable[[int], list[Batch]]) -> list[Step]:
    """The steps of a turn but the first, before which nothing could be read."""
    steps = []
    for number in range(STEPS_A_TURN + 1):
        started, cpu = time.perf_counter(), time.process_time()
        micro_batches = take(number)
        waited = time.perf_counter() - started
        engine.train_step(number, micro_batches)
        steps.append(Step(time.perf_counter() - started, waited, time.process_time() - cpu))
    return steps[1:]


if __name__ == "__main__":
    main()
