"""One of several ranks, run by test_rounded_weights.py: bfloat16 in DeepSpeed, beside the torch engine.

Its argument is an empty folder. Rank 0 prints as JSON what it found in every layout of DeepSpeed.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_lm.checkpoint import read, write
from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.logical import gathered
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.tiny import tiny

LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"ZeRO {stage}": {"zero_stage": stage} for stage in (1, 2, 3)},
    **{f"ZeRO {stage}, offload": {"zero_stage": stage, "offload_optimizer": True} for stage in (1, 2, 3)},
}
TRAIN = TrainConfig(
    steps=4, global_batch_size=4, micro_batch_size=1, precision="bfloat16", optimizer={"lr": 0.01, "eps": 1e-4}
)
BATCHES = Documents(seed=1)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    os.sched_getaffinity = lambda process: set(range(6))  # type: ignore[assignment]
    path = Path(folder)
    alone, found = build(ParallelConfig(device="cpu")), {}
    start, first = state_of(alone), step(alone, 0)
    write.save(path / "torch", 1, alone.state(), {})
    saved, second = state_of(alone), step(alone, 1)
    engines = [build(ParallelConfig(device="cpu", engine="deepspeed", **layout)) for layout in LAYOUTS.values()]
    for name, engine in zip(LAYOUTS, engines, strict=True):
        report = found[name] = {"bfloat16": narrow(engine), "start": away(state_of(engine), start)}
        once, four_times = (step(engine, 0, repeat=times, loss_limit=0.0) for times in (1, 4))
        report["four times the same"] = away(four_times, once)
        report["first step"] = away(step(engine, 0), first)
        load(engine, path / "torch")
        report["loaded"] = away(state_of(engine), saved)
        report["second step"] = away(step(engine, 1), second)
        report["threads"] = [*threads_of_step(engine), torch.get_num_threads()]
        write.save(path / name, 3, engine.state(), {})
        load(alone, path / name)
        report["loaded by torch"] = away(state_of(alone), state_of(engine))
    if alone.topology.is_main:
        print(json.dumps(found))
    for engine in engines:
        engine.close(leave=False)
    alone.close()


def build(parallel: ParallelConfig) -> Engine:
    built = build_model(tiny(num_hidden_layers=2, n_shared_experts=1), parallel, current_topology())
    built.initialise(seed=3)
    return build_engine(built, NextToken(), TRAIN, parallel, pad_id=2)


def step(engine: Engine, number: int, repeat: int | None = None, loss_limit: float = math.inf) -> dict[str, Tensor]:
    """Take a step, or one of its first micro-batch several times; returns its loss and its gradients."""
    gradients: dict[str, Tensor] = {}

    def keep() -> None:
        gradients.update(gathered(engine.gradients()))

    micro_batches = local_micro_batches(engine, BATCHES, TRAIN, number)
    if repeat is not None:
        micro_batches = micro_batches[:1] * repeat
    result = engine.train_step(number, micro_batches, keep, loss_limit)
    return gradients | {"loss": torch.tensor(result.loss)}


def threads_of_step(engine: Engine) -> set[int]:
    """The threads that the optimizer has when it is called."""
    optimizer, seen = engine.wrapped.optimizer.optimizer, set[int]()
    handle = optimizer.register_step_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
    step(engine, 2)
    handle.remove()
    return seen


def state_of(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in gathered(engine.state()).items() if name != "random.cpu"}


def load(engine: Engine, folder: Path) -> None:
    state = engine.state()
    (checkpoint,) = folder.iterdir()
    read.load(checkpoint, state)
    engine.load_state(state)


def narrow(engine: Engine) -> list[str]:
    """The names of the parameters that this rank keeps in bfloat16."""
    return [name for name, parameter in engine.model.named_parameters() if parameter.dtype == torch.bfloat16]


def away(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The greatest distance between tensors of a name, relative to the norm of the expected one."""
    assert found.keys() == expected.keys()
    assert all(tensor.dtype == expected[name].dtype for name, tensor in found.items())
    return max(
        float((tensor - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        for name, tensor in found.items()
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
