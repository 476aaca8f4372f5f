"""One of several ranks, run by test_starved_ranks.py: every token goes to the experts of rank 0. Argument: the engine.

Rank 0 prints the losses of three steps, and the norm of the gradient of each expert in the last.
"""

from __future__ import annotations

import json
import sys

import torch
from torch.distributed.tensor import DTensor

from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, place_model
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.tiny import tiny


def main(engine_name: str) -> None:
    torch.set_num_threads(1)
    world_size = current_topology().world_size
    parallel = ParallelConfig(device="cpu")
    if engine_name == "deepspeed":
        parallel = ParallelConfig(device="cpu", engine="deepspeed", expert_parallel_size=world_size, zero_stage=2)
    train = TrainConfig(
        steps=3, global_batch_size=8, micro_batch_size=2, precision="float32", activation_checkpointing=True,
        optimizer={"lr": 0.01, "eps": 1e-4}, balance={"bias_update_rate": 0},
    )  # fmt: skip
    placed = place_model(tiny(num_experts_per_tok=2), parallel, current_topology())
    placed.initialise(seed=3)
    with torch.no_grad():
        for layer in placed.model.moe_layers:
            layer.gate.e_score_correction_bias[:2] += 10
    engine = build_engine(placed, NextToken(), train, parallel, pad_id=2)
    batches = Documents(seed=1)
    gradients: dict[str, list[float]] = {}

    def keep() -> None:
        for name, gradient in engine.gradients().items():
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            if ".experts." in name:
                gradients[name] = whole.flatten(1).norm(dim=1).tolist()

    results = [engine.train_step(step, local_micro_batches(engine, batches, train, step), keep) for step in range(3)]
    if engine.topology.is_main:
        print(json.dumps({"losses": [result.loss for result in results], "gradients": gradients}))
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
    end(0)
