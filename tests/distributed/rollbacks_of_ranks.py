"""One of two ranks, run by test_rollbacks.py: a run that goes back, in a folder and several layouts.

Rank 0 prints for each layout the events, and the tensors that differ from a run that began at the same checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import torch

from moe_lm.common.process import end
from moe_lm.config.run import ParallelConfig
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.logical import gathered
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.topology import current_topology
from moe_lm.tools.verify.documents import Documents
from moe_lm.train.guards import NOTE
from tests.loops import LeftOut, LoopRun
from tests.tiny import tiny

BATCHES, BAD = Documents(seed=1), (3, 4)
SETTINGS = {"steps": 7, "save_every": 3, "keep": 9, "validation": [], "guards": {"max_skipped": 2}}


class RankRun(LoopRun):
    """A run of a layout: ZeRO's stage with both ranks expert-parallel, or 0 for data parallelism without DeepSpeed."""

    stage = 0

    def build(self) -> Engine:
        layout = {"engine": "deepspeed", "expert_parallel_size": 2, "zero_stage": self.stage} if self.stage else {}
        parallel = ParallelConfig(device="cpu", **layout)
        built = build_model(tiny(num_hidden_layers=2), parallel, current_topology())
        built.initialise(seed=3)
        return build_engine(built, NextToken(), self.config, parallel, pad_id=2)


def run(folder: Path, stage: int) -> tuple[dict[str, object], list[Engine]]:
    RankRun.stage = stage
    gone_back = RankRun(folder / "back", BATCHES, poison=lambda step: math.nan if step in BAD else 1.0, **SETTINGS)
    fresh = RankRun(folder / "fresh", LeftOut(BATCHES, range(3, 5)), **SETTINGS)
    gone_back()
    Ranks().first(lambda: copy_checkpoint(gone_back.folder, fresh.folder, 3), ())
    fresh()
    found, expected = gathered(gone_back.engine.state()), gathered(fresh.engine.state())
    differ = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    losses = [[line["loss"] for line in each.records if line["step"] > 3] for each in (gone_back, fresh)]
    engines = [gone_back.engine, fresh.engine]
    return {"events": gone_back.kinds, "differ": differ, "tensors": len(expected), "losses": losses}, engines


def copy_checkpoint(source: Path, target: Path, step: int) -> None:
    name = f"checkpoints/step-{step:08d}"
    shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns(NOTE))


def main(folder: str, *stages: str) -> None:
    torch.set_num_threads(1)
    found, engines = {}, []
    for stage in stages:
        (Path(folder) / stage).mkdir(exist_ok=True)
        found[stage], more = run(Path(folder) / stage, int(stage))
        engines += more
    if engines[0].topology.is_main:
        print("found", json.dumps(found))
    for engine in engines[1:]:
        engine.close(leave=False)
    engines[0].close()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end(0)
