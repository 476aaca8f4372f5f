"""One of several ranks, run by test_experts_of_ranks.py: `poisoned STAGE FACTOR ...` or `starved ENGINE`.

Rank 0 prints what it found, as JSON.
"""

from __future__ import annotations

import json
import math
import sys

import torch
from torch import Tensor

from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import RankModel, build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.model.transformer import is_expert
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.expert_parallel import EXPERT
from moe_lm.parallel.logical import gathered
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.distributed.dispatch_of_ranks import dispatched
from tests.tiny import tiny

POISONED, REJECTED = 2, 4
TRAIN = TrainConfig(
    steps=6, global_batch_size=8, micro_batch_size=2, precision="float32", optimizer={"lr": 0.01, "eps": 1e-4}
)
BATCHES = Documents(seed=1)


def poisoned(*stages_and_factors: str) -> None:
    """In step 2 experts on the last rank get gradients without end, in step 4 the loss is above its limit.

    Prints for every stage (ZeRO's, or 0 for the torch engine) and every step whether it was skipped and whether the
    state stayed as it was, then the number of values in the last state that are not finite.
    """
    pairs = list(zip(stages_and_factors[::2], stages_and_factors[1::2], strict=True))
    found, engines = [], []
    for stage, factor in pairs:
        engine, figures = train_poisoned(stage, float(factor))
        found.append(figures)
        engines.append(engine)
    for engine in engines[1:]:
        engine.close(leave=False)
    report(engines[0], found)


def train_poisoned(stage: str, factor: float) -> tuple[Engine, dict[str, object]]:
    layout = {"engine": "deepspeed", "expert_parallel_size": 2, "zero_stage": int(stage)} if stage != "0" else {}
    parallel = ParallelConfig(device="cpu", **layout)
    built, step = build(parallel), 0
    engine = build_engine(built, NextToken(), TRAIN, parallel, pad_id=2)  # which makes the parameters of ZeRO 3
    parameter = built.model.moe_layers[0].experts.down_proj
    if built.topology.rank == built.topology.world_size - 1:
        parameter.register_hook(lambda gradient: gradient * factor if step == POISONED else gradient)
    found, before = [], state_of(engine)
    for step in range(TRAIN.steps):
        limit = 0.1 if step == REJECTED else math.inf
        result = engine.train_step(step, local_micro_batches(engine, BATCHES, TRAIN, step), loss_limit=limit)
        after = state_of(engine)
        found.append([result.skipped, all(torch.equal(before[name], after[name]) for name in after)])
        before = after
    broken = sum(int((~tensor.isfinite()).sum()) for tensor in before.values())
    return engine, {"steps": found, "broken": broken}


def starved(engine_name: str) -> None:
    """Every token goes to the experts of rank 0.

    Prints the losses of three steps, and the norm of the gradient of each expert in the last; of ranks that share
    experts also what `dispatched` finds, which needs no processes of its own.
    """
    parallel = ParallelConfig(device="cpu")
    if engine_name == "deepspeed":
        size = current_topology().world_size
        parallel = ParallelConfig(device="cpu", engine="deepspeed", expert_parallel_size=size, zero_stage=2)
    balance = TRAIN.balance.model_copy(update={"bias_update_rate": 0})
    train = TRAIN.model_copy(update={"steps": 3, "activation_checkpointing": "full", "balance": balance})
    built = build(parallel, num_experts_per_tok=2)
    with torch.no_grad():
        for layer in built.model.moe_layers:
            layer.gate.e_score_correction_bias[:2] += 10
    engine = build_engine(built, NextToken(), train, parallel, pad_id=2)
    gradients: dict[str, list[float]] = {}

    def keep() -> None:
        for name, gradient in gathered(engine.gradients()).items():
            if is_expert(name):
                gradients[name] = gradient.flatten(1).norm(dim=1).tolist()

    steps = range(train.steps)
    results = [engine.train_step(step, local_micro_batches(engine, BATCHES, train, step), keep) for step in steps]
    found = {"losses": [result.loss for result in results], "gradients": gradients}
    if built.mesh is not None:
        found["dispatched"] = dispatched(built.mesh.get_group(EXPERT))
    report(engine, found)


def build(parallel: ParallelConfig, **changes: int) -> RankModel:
    torch.set_num_threads(1)
    built = build_model(tiny(**changes), parallel, current_topology())
    built.initialise(seed=3)
    return built


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gathered(engine.state()).items() if name != "random.cpu"}


def report(engine: Engine, found: object) -> None:
    if engine.topology.is_main:
        print(json.dumps(found))
    engine.close()


if __name__ == "__main__":
    {"poisoned": poisoned, "starved": starved}[sys.argv[1]](*sys.argv[2:])
    end(0)
