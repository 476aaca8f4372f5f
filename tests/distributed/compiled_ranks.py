"""One of several ranks, run by test_compiled_ranks.py: `BACKEND ENGINE RECOMPUTATION ...` trains as it is and compiled.

Rank 0 prints, as JSON, the losses of both and what the compiler did, for every pair of an engine and a recomputation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.loop import local_micro_batches
from tests.distributed.experts_of_ranks import report
from tests.tiny import tiny

STEPS = 4
BATCHES = Documents(seed=1)  # packed: every micro-batch has another number of documents, every expert other loads
BUCKET = 4096  # bytes of gradients that DDP reduces at once: fewer than a block has


def main(backend: str, *engines_and_recomputations: str) -> None:
    torch.set_num_threads(1)
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = BUCKET
    compiler = CompileCounterWithBackend(backend)
    compile_with_default, torch.compile = (
        torch.compile,
        lambda function: compile_with_default(function, backend=compiler),
    )
    engines, found = [], []
    for engine_name, how in zip(engines_and_recomputations[::2], engines_and_recomputations[1::2], strict=True):
        torch._dynamo.reset()
        compiler.frame_count = 0
        counters.clear()
        clear_compilation_metrics()
        expected, losses = (train(engine_name, how, compiled, engines) for compiled in (False, True))
        breaks = [" ".join(reason.split()) for reason in counters["graph_break"]]
        again = [metrics.recompile_reason for metrics in get_compilation_metrics() if metrics.recompile_reason]
        graphs = compiler.frame_count
        found.append({"losses": losses, "expected": expected, "graphs": graphs, "breaks": breaks, "again": again})
    for engine in engines[:-1]:
        engine.close(leave=False)
    report(engines[-1], found)


def train(engine_name: str, how: str, compiled: bool, engines: list[Engine]) -> list[list[float]]:
    """The loss and the norm of the gradient of every step; the engine is added to `engines`."""
    topology = current_topology()
    layout: dict[str, Any] = {"engine": engine_name}
    if engine_name == "deepspeed":
        layout |= {"expert_parallel_size": topology.world_size, "zero_stage": 2}
    parallel = ParallelConfig(device="cpu", **layout)
    config = TrainConfig(
        steps=STEPS, global_batch_size=8, micro_batch_size=2, precision="float32", compile=compiled,
        activation_checkpointing=how, optimizer={"lr": 0.01, "eps": 1e-4},
    )  # fmt: skip
    built = build_model(tiny(num_hidden_layers=2, first_k_dense_replace=0), parallel, topology)
    built.initialise(seed=3)
    engine = build_engine(built, NextToken(), config, parallel, pad_id=2)
    if engine_name == "torch":
        engine.wrapped.bucket_bytes_cap = BUCKET
    results = [engine.train_step(step, local_micro_batches(engine, BATCHES, config, step)) for step in range(STEPS)]
    engines.append(engine)
    return [[result.loss, result.grad_norm] for result in results]


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
