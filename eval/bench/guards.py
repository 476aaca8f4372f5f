"""What guards and alarms cost, as a share of a real training step, each step in turn with its own judgement.

    python -m eval.bench.guards [--output eval/results/guards.json]

Two models on text of Python's standard library: the tests' tiny one, whose steps are as short as steps get, and one of
some million parameters. Counted is processor time, which a busy machine changes least. Before a checkpoint the guard
also reads the whole state (`first_not_finite`), which is set against the steps between two checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from eval.bench.alarms import Values, pretrain_config
from moe_lm.data.prepare import prepare
from moe_lm.engine.build import build_engine, build_model
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import current_topology
from moe_lm.train.alarms import Alarms
from moe_lm.train.figures import step_record
from moe_lm.train.guards import Guard, first_not_finite
from moe_lm.train.log import RunLog
from moe_lm.train.loop import local_micro_batches
from moe_lm.train.past import Plan
from moe_lm.train.pretrain import load_tokenizer, open_shards, training_batches

SMALL: Values = {
    "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 512,
    "moe_intermediate_size": 96, "n_routed_experts": 16, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: dict[str, tuple[Values, int]] = {"tiny": ({}, 400), "small": (SMALL, 120)}  # changes of the model, and steps
WARM_UP_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        models = {name: measure(Path(folder), name, *given) for name, given in MODELS.items()}
    result = {
        "date": date.today().isoformat(),
        "models": models,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "load_average": [round(load, 2) for load in (before, os.getloadavg()[0])],
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(folder: Path, name: str, model: Values, steps: int) -> dict[str, Any]:
    """Processor time of a step, and of what guard and alarms do after it, step by step."""
    config = pretrain_config(folder, name, model, {"steps": 10**6})
    prepare(config.data)
    tokenizer = load_tokenizer(config)
    built = build_model(config.model, config.parallel, current_topology())
    built.initialise(config.train.seed)
    engine = build_engine(built, NextToken(), config.train, config.parallel, tokenizer.pad_id)
    batches = training_batches(config, open_shards(config, "train", tokenizer))
    log = RunLog(folder, config.log, steps, name, 0, is_main=False)
    guard, alarms = Guard(config.train.guards, log, {}), Alarms(Plan(config.train, config.model))
    trained, judged, looked = [], [], []
    for step in range(1, WARM_UP_STEPS + steps + 1):
        times = [time.process_time()]
        rows = local_micro_batches(engine, guard.batches(batches), config.train, step - 1)
        result = engine.train_step(step - 1, rows, loss_limit=guard.loss_limit)
        record = step_record(step, result, 1.0, 0.0, 0.0, engine, 1)
        times.append(time.process_time())
        guard.judge(step, result)
        times.append(time.process_time())
        alarms.after(record)
        times.append(time.process_time())
        if step > WARM_UP_STEPS:
            for seconds, start, end in zip((trained, judged, looked), times, times[1:], strict=False):
                seconds.append(end - start)
    state, reads = engine.state(), []
    for _ in range(20):
        started = time.process_time()
        assert not first_not_finite(state)
        reads.append(time.process_time() - started)
    a_step, a_read = statistics.fmean(trained), statistics.median(reads)
    every = type(config.checkpoint)().every
    return {
        "parameters": sum(weight.numel() for weight in built.model.parameters()),
        "steps": steps,
        "milliseconds_a_step": round(1e3 * a_step, 2),
        "microseconds_of_the_guard": round(1e6 * statistics.fmean(judged), 1),
        "microseconds_of_the_alarms": round(1e6 * statistics.fmean(looked), 1),
        "percent_of_a_step": round(100 * (statistics.fmean(judged) + statistics.fmean(looked)) / a_step, 3),
        "milliseconds_to_read_the_state_before_a_checkpoint": round(1e3 * a_read, 2),
        f"percent_of_{every}_steps": round(100 * a_read / (every * a_step), 3),
    }


if __name__ == "__main__":
    main()
