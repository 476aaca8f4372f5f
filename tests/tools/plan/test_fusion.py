"""The model of fusion against inductor: what its scheduler counts for the graphs that it really compiles."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_loss, build_model
from moe_lm.objective.training_loss import NextToken, StepCounts
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan import simulate as simulation
from moe_lm.tools.plan.recording import Recording
from moe_lm.tools.plan.simulate import simulate
from tests.tiny import tiny

ALONE, ROWS, LENGTH = ParallelConfig(device="cpu"), 4, 256
MODEL = tiny(
    vocab_size=512, hidden_size=256, num_hidden_layers=2, intermediate_size=512, max_position_embeddings=512,
    moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4,
)  # fmt: skip
TRAIN = TrainConfig(steps=1, global_batch_size=ROWS, precision="float32", compile=True)


@pytest.mark.slow
def test_bytes_and_kernels_are_close_to_inductors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense block and one with experts, forward and backward, on this CPU."""
    recordings: list[Recording] = []
    fuse = simulation.fuse
    monkeypatch.setattr(simulation, "fuse", lambda recording: (fuse(recording), recordings.append(recording)))
    simulate(MODEL, TRAIN, ALONE, LENGTH, device="cpu")
    kernels = [k for k in recordings[0].kernels if k.place.region is not None and k.place.layer is not None]
    predicted = [k for k in kernels if k.product is None]

    counted: list[tuple[Any, int]] = []
    compile_to_module = GraphLowering.compile_to_module

    @functools.wraps(compile_to_module)
    def counting(graph: GraphLowering) -> Any:
        module = compile_to_module(graph)
        counted.extend((node, 4 * words) for node, words in graph.count_bytes()[1])
        return module

    monkeypatch.setattr(GraphLowering, "compile_to_module", counting)
    with torch._inductor.config.patch(force_disable_caches=True):
        _step(build_model(MODEL, ALONE, Topology()))
    fused = [size for node, size in counted if not isinstance(node, ExternKernelSchedulerNode | NopKernelSchedulerNode)]
    assert sum(k.bytes for k in predicted) == pytest.approx(sum(fused), rel=0.1)
    assert sum(k.launches for k in predicted if k.pointwise or k.reduction) == pytest.approx(len(fused), rel=0.25)


def _step(built: Any) -> None:
    built.initialise(1)
    loss = build_loss(built, NextToken(), TRAIN, pad_id=-1, dtype=torch.float32)
    batch = simulation._batch(ROWS, LENGTH)
    batch.cu_seqlens.copy_(torch.arange(ROWS + 1) * LENGTH)
    tokens = ROWS * LENGTH
    loss(batch, StepCounts(tokens, tokens, tokens, ROWS)).loss.backward()
