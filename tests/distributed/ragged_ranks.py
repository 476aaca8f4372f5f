"""One of several ranks, run by test_data_parallel.py: steps on ragged batches, for each balance. Argument: a folder.

Every rank prints its results as JSON lines, six a balance, and all save a checkpoint at the end. In step 2 the last
rank alone has a gradient that is not finite.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from moe_lm.checkpoint import write
from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, place_model
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.process_group import leave
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.tiny import tiny

BALANCES = {
    "default": {},
    "every loss": {"bias_update_rate": 0.01, "sequence_loss": 0.3, "batch_loss": 0.5, "z_loss": 0.1},
}
SPOILT_STEP = 2
PARALLEL = ParallelConfig(device="cpu")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    for name, balance in BALANCES.items():
        run(folder / name, balance)
    leave()


def run(folder: Path, balance: dict[str, float]) -> None:
    config = TrainConfig(
        steps=5, global_batch_size=8, micro_batch_size=2, precision="float32", balance=balance,
        optimizer={"lr": 0.01, "eps": 1e-4}, schedule={"warmup_steps": 2},
    )  # fmt: skip
    placed = place_model(tiny(), PARALLEL, current_topology())
    placed.initialise(seed=3)
    model = placed.model
    engine = build_engine(placed, NextToken(), config, PARALLEL, pad_id=2)
    batches = Documents(seed=1)
    last_rank = engine.topology.rank == engine.topology.world_size - 1
    for step in range(config.steps):
        value = math.inf if step == SPOILT_STEP and last_rank else 1.0
        hook = model.model.norm.weight.register_hook(lambda gradient, value=value: gradient * value)
        result = engine.train_step(step, local_micro_batches(engine, batches, config, step))
        hook.remove()
        biases = [layer.gate.e_score_correction_bias.tolist() for layer in model.moe_layers]
        figures = {"loss": result.loss, "balance": result.balance_loss, "norm": result.grad_norm}
        counts = {
            "tokens": result.tokens,
            "targets": result.targets,
            "load": result.load.tolist(),
            "skipped": result.skipped,
            "biases": biases,
        }
        print(json.dumps(figures | counts), flush=True)
    sums, targets = engine.evaluate([batches.batch(100 + number, range(3)) for number in range(3)])
    flags = {"any": engine.any_rank(last_rank), "none": engine.any_rank(False)}
    print(json.dumps({"nll": sums["loss"], "targets": targets} | flags))
    write.save(folder, config.steps, engine.state(), {})
    engine.close(leave=False)  # to meet again at the same address, before the other rank has left, would hang


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
