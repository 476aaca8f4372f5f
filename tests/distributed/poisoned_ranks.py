"""One of several ranks, run by test_poisoned_ranks.py: in step 2 experts on the last rank get gradients without end.

Arguments: ZeRO's stage (0: the torch engine), and the factor of the gradient. Rank 0 prints for every step whether it
was skipped and whether the state stayed as it was, then the number of values in the last state that are not finite.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, place_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.logical import host_copy, whole
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.tiny import tiny

POISONED = 2


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: host_copy(whole(tensor)) for name, tensor in engine.state().items() if name != "random.cpu"}


def main(stage: int, factor: float) -> None:
    torch.set_num_threads(1)
    layout = {"engine": "deepspeed", "expert_parallel_size": 2, "zero_stage": stage} if stage else {}
    parallel, topology = ParallelConfig(device="cpu", **layout), current_topology()
    train = TrainConfig(
        steps=4, global_batch_size=8, micro_batch_size=2, precision="float32", optimizer={"lr": 0.01, "eps": 1e-4}
    )
    placed = place_model(tiny(), parallel, topology)
    placed.initialise(seed=3)
    step = 0
    parameter = placed.model.moe_layers[0].experts.up_proj
    if topology.rank == topology.world_size - 1:
        parameter.register_hook(lambda gradient: gradient * factor if step == POISONED else gradient)
    engine = build_engine(placed, NextToken(), train, parallel, pad_id=2)
    batches = Documents(seed=1)
    found, before = [], state_of(engine)
    for step in range(train.steps):
        result = engine.train_step(step, local_micro_batches(engine, batches, train, step))
        after = state_of(engine)
        found.append([result.skipped, all(torch.equal(before[name], after[name]) for name in after)])
        before = after
    if topology.is_main:
        broken = sum(int((~tensor.isfinite()).sum()) for tensor in before.values())
        print(json.dumps({"steps": found, "broken": broken}))
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
    end(0)
