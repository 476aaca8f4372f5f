"""One of several ranks, run by test_poisoned_ranks.py: in step 2 experts of the last rank get gradients without end.

Arguments: ZeRO's stage, and what the gradient is multiplied by. Rank 0 prints for every step whether it was skipped and
whether the state stayed as it was, then the number of values in the last state that are not finite.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from moe_lm.common.process import end
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, place_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.logical import host_copy, whole
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches

POISONED = 2


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: host_copy(whole(tensor)) for name, tensor in engine.state().items() if name != "random.cpu"}


def main(stage: int, factor: float) -> None:
    torch.set_num_threads(1)
    parallel = ParallelConfig(device="cpu", engine="deepspeed", expert_parallel_size=2, zero_stage=stage)
    train = TrainConfig(
        steps=4, global_batch_size=8, micro_batch_size=2, precision="float32", optimizer={"lr": 0.01, "eps": 1e-4}
    )
    model = ModelConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        n_routed_experts=8, initializer_range=0.3,
    )  # fmt: skip
    placed = place_model(model, parallel, current_topology())
    placed.initialise(seed=3)
    step = 0
    parameter = placed.model.moe_layers[0].experts.up_proj
    if placed.first_expert > 0:
        parameter.register_hook(lambda gradient: gradient * factor if step == POISONED else gradient)
    engine = build_engine(placed, NextToken(), train, parallel, pad_id=2)
    batches = Documents(seed=1)
    found, before = [], state_of(engine)
    for step in range(train.steps):
        result = engine.train_step(step, local_micro_batches(engine, batches, train, step))
        after = state_of(engine)
        found.append([result.skipped, all(torch.equal(before[name], after[name]) for name in after)])
        before = after
    if engine.topology.is_main:
        broken = sum(int((~tensor.isfinite()).sum()) for tensor in before.values())
        print(json.dumps({"steps": found, "broken": broken}))
    engine.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
    end(0)
