"""How far the losses of layouts part over many steps, in bfloat16 and in float32, and why.

    python -m eval.studies.losses_of_layouts [--steps 50] [--out eval/results/losses_of_layouts.json]

`moe-lm verify` compares the first steps. Here a model of its size trains longer, in one process and over two ranks, on
the same documents. Two rows show what no layout can be better than: one process again with other micro-batches, and one
process in which a single weight is moved by its last float32 digit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.common.process import end
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import TrainConfig
from moe_lm.engine.build import build_engine, build_model, rank_device
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.process_group import join, leave
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.ranks import run_ranks
from moe_lm.tools.verify.documents import Documents
from moe_lm.tools.verify.layouts import deepspeed
from moe_lm.tools.verify.scale import BATCH, LENGTH, PAD, VOCABULARY
from moe_lm.train.loop import local_micro_batches

TASK = "task.json"
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": LENGTH, "moe_intermediate_size": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "initializer_range": 0.2,
}  # fmt: skip
# The first has the learning rate of verify, with which errors show soon; the others each lack a possible cause.
SETTINGS: dict[str, dict[str, Any]] = {
    "learning rate 0.01": {},
    "not clipped": {"clip_norm": None},
    "all experts chosen": {"model": {"num_experts_per_tok": 8}},
    "no experts": {"model": {"n_routed_experts": 0, "n_shared_experts": 0}},
    "learning rate 0.001": {"lr": 0.001},
}
REFERENCE = "one process"
LAYOUTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"world_size": 1},
    "a weight moved by its last digit": {"world_size": 1, "moved": True},
    "micro-batches of 1": {"world_size": 1, "micro_batch_size": 1},
    "data parallel": {"world_size": 2},
    **{
        f"EP {size}, ZeRO {stage}": {"world_size": 2, "parallel": deepspeed(size, stage)}
        for size in (1, 2)
        for stage in (1, 2, 3)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / TASK).write_text(json.dumps({"steps": arguments.steps, "settings": arguments.settings}))
        losses: dict[str, dict[str, dict[str, list[float]]]] = {}
        for world_size in (1, 2):
            run_ranks("eval.studies.losses_of_layouts", folder, world_size, timeout_seconds=3600)
            for run, found in json.loads((folder / f"{world_size}.json").read_text()).items():
                losses[run] = losses.get(run, {}) | found
    table = {run: distances(run, losses) for run in losses}
    for run, rows in table.items():
        print(run)
        for layout, row in rows.items():
            print(f"  {layout:34}", *(f"{what} {value:.1e}" for what, value in row.items()), sep="  ")
    if arguments.out:
        arguments.out.write_text(json.dumps({"steps": arguments.steps, "runs": table}, indent=1) + "\n")


def distances(run: str, losses: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Relative differences from one process and from its float32 run: the greatest of a step, that of the mean loss."""
    setting = run.split(", ", 1)[1]
    found, wide = losses[run], losses[f"float32, {setting}"][REFERENCE]
    return {
        layout: {
            "from one process": apart(steps, found[REFERENCE]),
            "from float32": apart(steps, wide),
            "mean, from one process": abs(fmean(steps) / fmean(found[REFERENCE]) - 1),
            "mean, from float32": abs(fmean(steps) / fmean(wide) - 1),
        }
        for layout, steps in found.items()
    }


def apart(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def train_here(folder: Path) -> None:
    """Train every setting in every layout of this number of processes; rank 0 writes the losses."""
    torch.set_num_threads(1)
    topology, task = current_topology(), json.loads((folder / TASK).read_text())
    if topology.world_size > 1:
        join(Meeting(topology), rank_device(ParallelConfig(device="cpu"), topology), 600)
    losses: dict[str, dict[str, list[float]]] = {}
    for setting in task["settings"]:
        for precision in ("float32", "bfloat16"):
            for name, layout in LAYOUTS.items():
                divides = SETTINGS[setting].get("model", {}).get("n_routed_experts") != 0
                if layout["world_size"] == topology.world_size and (divides or not name.startswith("EP 2")):
                    found = train(layout, precision, task["steps"], **SETTINGS[setting])
                    losses.setdefault(f"{precision}, {setting}", {})[name] = found
    if topology.is_main:
        (folder / f"{topology.world_size}.json").write_text(json.dumps(losses))
    leave()


def train(
    layout: dict[str, Any], precision: str, steps: int, lr: float = 0.01, clip_norm: float | None = 0.5,
    model: dict[str, Any] | None = None,
) -> list[float]:  # fmt: skip
    """The loss of every step."""
    config = TrainConfig(
        steps=steps, global_batch_size=BATCH, micro_batch_size=layout.get("micro_batch_size", 2), precision=precision,
        optimizer={"lr": lr, "eps": 1e-4}, schedule={"name": "constant", "warmup_steps": 2}, clip_norm=clip_norm,
    )  # fmt: skip
    parallel = ParallelConfig.model_validate({"device": "cpu"} | layout.get("parallel", {}))
    built = build_model(ModelConfig(**MODEL | (model or {})), parallel, current_topology())
    built.initialise(seed=3)
    if layout.get("moved"):
        # A norm's weight: the last digit of one that is multiplied is lost when it is rounded to bfloat16.
        weight = built.model.model.layers[0].input_layernorm.weight.data
        weight[0] = torch.nextafter(weight[0], weight.new_tensor(math.inf))
    engine = build_engine(built, NextToken(), config, parallel, PAD)
    documents = Documents(seed=1)
    losses = [
        engine.train_step(step, local_micro_batches(engine, documents, config, step)).loss for step in range(steps)
    ]
    engine.close(leave=False)
    return losses


if __name__ == "__main__":
    if len(sys.argv) == 2 and Path(sys.argv[1]).is_dir():  # as run_ranks calls it
        train_here(Path(sys.argv[1]))
        end(0)
    main()
