"""One rank of the parity check: runs the layouts of its world size and records every step.

Run as `python -m moe_lm.tools.verify.worker FOLDER`, with RANK and WORLD_SIZE in the environment.
"""

from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.common.process import end, end_with_parent
from moe_lm.common.signals import STOP_SIGNALS
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import BatchSource
from moe_lm.engine.build import build_engine, build_model, rank_device
from moe_lm.engine.engine import Engine
from moe_lm.model import layers
from moe_lm.objective.preference import PreferenceObjective
from moe_lm.objective.training_loss import NextToken, Objective
from moe_lm.parallel import logical
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join, leave
from moe_lm.parallel.topology import Topology, current_topology
from moe_lm.tools.verify.documents import DOCUMENTS, Documents, Pairs
from moe_lm.tools.verify.groups import DispatchInGroups
from moe_lm.tools.verify.layouts import CHANGE, PLAN, Layout, Plan
from moe_lm.tools.verify.scale import BATCH, PAD, STEPS
from moe_lm.tools.verify.weights import favouring_biases, initialise
from moe_lm.train.loop import local_micro_batches


def main(folder: Path) -> None:
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    torch.set_num_threads(1)
    plan = Plan.model_validate_json((folder / PLAN).read_text(encoding="utf-8"))
    if plan.sabotage is not None:
        runpy.run_path(str(plan.sabotage))
    topology = current_topology()
    if topology.world_size > 1:
        join(Meeting(topology), rank_device(plan.parallel, topology), plan.parallel.timeout_seconds)
    biases = biases_of(plan)
    for number, layout in enumerate(plan.layouts):
        if layout.world_size == topology.world_size:
            print(f"layout: {layout.name}", flush=True)
            with loss_in_chunks(layout.loss_chunk):
                run(layout, plan, topology, folder, folder / f"{number}", biases)
    leave()


def run(layout: Layout, plan: Plan, topology: Topology, folder: Path, results: Path, biases: Sequence[float]) -> None:
    """Run the steps of one layout, from the initial weights or from another layout's checkpoint.

    `biases` are those of the favoured experts.
    """
    train = training_of(layout, plan.train)
    parallel = ParallelConfig.model_validate(plan.parallel.model_dump() | layout.parallel)
    built = build_model(plan.model, parallel, topology, plan.lora, train.freeze_router, precision=train.precision)
    initialise(built, train.seed, biases)
    if layout.expert_groups > 1:
        for layer in built.model.moe_layers:
            layer.dispatcher = DispatchInGroups(layout.expert_groups)
    objective: Objective = PreferenceObjective(plan.preference) if plan.preference else NextToken()
    engine = build_engine(built, objective, train, parallel, PAD)
    batches = batch_source(layout, plan, engine)
    if layout.load_from is not None:
        state = engine.state()
        read.load(checkpoint.resolve(folder / layout.load_from), state)
        engine.load_state(state)
    gradients: dict[str, Tensor] = {}

    def observe() -> None:
        gradients.update(logical.gathered(engine.gradients()))

    steps = []
    for step in layout.steps:
        if step == CHANGE and layout.save_as is not None:
            write.save(folder / layout.save_as / "checkpoints", step, engine.state(), {})
        result = engine.train_step(step, local_micro_batches(engine, batches, train, step), observe)
        observed = {f"gradient/{name}": tensor for name, tensor in gradients.items()} | buffers(engine)
        if step in (0, CHANGE, layout.steps[-1]):  # gathering takes most of the time; gradients cover the other steps
            observed |= weights(engine)
        if engine.topology.is_main:
            results.mkdir(exist_ok=True)
            save_file(observed, results / f"{step}.safetensors")
        steps.append(
            {
                "step": step,
                "loss": result.loss,
                "balance loss": result.balance_loss,
                "gradient norm": result.grad_norm,
                "expert counts": result.load.tolist(),
            }
        )
    if engine.topology.is_main:
        (results / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    engine.close(leave=False)


@contextmanager
def loss_in_chunks(positions: int | None) -> Iterator[None]:
    """Let the loss take so many positions at a time. By default a chunk would hold all those of a small model."""
    if positions is None:
        yield
        return
    rows = dict.fromkeys(("cpu", "cuda"), positions)
    with patch.dict(layers.CHUNK_ROWS, rows), patch.dict(layers.CHUNK_BYTES, dict.fromkeys(rows, 0)):
        yield


def biases_of(plan: Plan) -> list[float]:
    """The favoured experts' biases, which every rank finds by itself, with the whole model on its CPU."""
    built = build_model(plan.model, ParallelConfig(device="cpu"), Topology(), plan.lora, plan.train.freeze_router)
    seed = plan.train.seed
    return favouring_biases(built, seed, Documents(seed).batch(0, range(BATCH * STEPS)))


def batch_source(layout: Layout, plan: Plan, engine: Engine) -> BatchSource:
    """Documents or, for preference tuning, pairs with the reference of the initial model."""
    if plan.preference is None:
        return Documents(plan.train.seed, layout.packed)
    pairs = Pairs(plan.train.seed, layout.packed)
    pairs.add_reference(engine, layout.steps)
    return pairs


def training_of(layout: Layout, train: TrainConfig) -> TrainConfig:
    """The training config of this layout: the same steps on the same documents."""
    changes: dict[str, object] = {
        "micro_batch_size": layout.micro_batch_size,
        "compile": layout.compile,
        "activation_checkpointing": layout.activation_checkpointing,
        "optimizer": train.optimizer.model_copy(update={"name": layout.optimizer}),
    }
    if not layout.packed:
        changes["global_batch_size"] = train.global_batch_size * DOCUMENTS
    balance: dict[str, object] = {"bias_update": layout.bias_update}
    if not layout.sequence_loss:
        balance["sequence_loss"] = 0.0
    changes["balance"] = train.balance.model_copy(update=balance)
    return train.model_copy(update=changes)


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Router biases, which every rank holds."""
    return {f"weight/{name}": tensor.detach().cpu().clone() for name, tensor in engine.model.named_buffers()}


def weights(engine: Engine) -> dict[str, Tensor]:
    """Parameters and router biases, as a checkpoint has them."""
    state = {name: tensor for name, tensor in engine.state().items() if name.startswith("model.")}
    return {f"weight/{name.removeprefix('model.')}": tensor for name, tensor in logical.gathered(state).items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end(0)
