"""What `moe-lm plan` predicts beside what real processes take: peak memory and step time on this machine.

    python -m eval.studies.prediction [--only TEXT] [--output eval/results/prediction.json]

Every point is a layout that gloo ranks train in on this machine, on random tokens: 1, 2 and 4 ranks, ZeRO stages 1, 2
and 3, two sizes of model, with and without recomputation. Memory is the peak of a rank's resident set over what it was
before the model was built; malloc gives freed memory back (MALLOC_*), as an allocator of GPU memory reuses it. The
prediction is that of `moe-lm plan --gpu cpu`, whose rates are measured in the same minute. Aims: 10% of memory, 25% of
time, and the order of layouts. Run it on a machine that does nothing else, or its times mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from moe_lm.config.reading import build_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import Recomputation
from moe_lm.tools.plan.plan import device_here, resolved, tracer_of
from moe_lm.tools.plan.search import estimate
from moe_lm.tools.ranks import run_ranks

WORKER = "eval.studies.prediction"
SHAPE: dict[str, Any] = {
    "vocab_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 256,
    "n_routed_experts": 16, "num_experts_per_tok": 2, "n_shared_experts": 1,
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {  # of float32 weights: about 60 and 230 MB
    "small": {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256},
    "large": {"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 512},
}
LENGTH, ROWS = 256, 16  # of the global batch
STEPS = 4  # of which the first warms up
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "1"}
TIMEOUT_SECONDS = 300
ALIKE = 0.1  # times that differ by less say nothing of an order


@dataclass(frozen=True)
class Point:
    """A layout to measure. Stage 0 is the engine without DeepSpeed."""

    size: str
    ranks: int
    stage: int
    recompute: Recomputation

    @property
    def name(self) -> str:
        return f"{self.size}, {self.ranks} x {f'ZeRO {self.stage}' if self.stage else 'torch'}, {self.recompute}"

    def config(self) -> PretrainConfig:
        """The run, with two micro-batches a step on each rank."""
        parallel: dict[str, Any] = {"device": "cpu"}
        if self.stage:
            parallel |= {"engine": "deepspeed", "expert_parallel_size": min(2, self.ranks), "zero_stage": self.stage}
        train = {
            "steps": STEPS,
            "global_batch_size": ROWS,
            "micro_batch_size": ROWS // self.ranks // 2,
            "activation_checkpointing": self.recompute,
        }
        nowhere = {"tokenizer": "none", "shards": "none", "sources": [{"name": "none", "path": "none"}]}
        values = {
            "run_dir": "none",
            "model": SHAPE | SIZES[self.size],
            "data": {**nowhere, "sequence_length": LENGTH},
            "train": train,
            "parallel": parallel,
        }
        return build_config(PretrainConfig, values, "a point of the study")


def points() -> list[Point]:
    """Every layout of the study."""
    layouts = [(1, 0), (2, 1), (2, 2), (2, 3), (4, 1), (4, 2), (4, 3)]
    kinds: tuple[Recomputation, ...] = ("none", "full")
    return [Point(size, *layout, kind) for size, layout, kind in itertools.product(SIZES, layouts, kinds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="points whose name holds this text, like '2 x ZeRO 1'")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    before, rows = os.getloadavg()[0], []
    for point in points():
        if arguments.only in point.name:
            rows.append(compare(point))
            print("{name:32} memory {memory_ratio:5.2f}  time {time_ratio:5.2f}".format(**rows[-1]), flush=True)
    result = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load_average": [round(load, 2) for load in (before, os.getloadavg()[0])],
        "aims": {"memory": 0.1, "time": 0.25},
        "worst": {kind: max(abs(row[f"{kind}_ratio"] - 1) for row in rows) for kind in ("memory", "time")},
        "order": order(rows),
        "points": rows,
    }
    print(json.dumps({key: result[key] for key in ("worst", "order", "load_average")}, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(point: Point) -> dict[str, Any]:
    """Predicted over measured, of a layout."""
    here = torch.device("cpu")
    config = resolved(point.config(), here)
    device = device_here(config, config.model, point.ranks, here, None, ())
    predicted = estimate(config, point.ranks, device, tracer_of(config.model, "cpu"))
    found = measure(point)
    return {
        "name": point.name,
        **asdict(point),
        "predicted_bytes": predicted.peak,
        "measured_bytes": found["bytes"],
        "memory_ratio": round(predicted.peak / found["bytes"], 3),
        "predicted_seconds": round(predicted.seconds, 4),
        "measured_seconds": round(found["seconds"], 4),
        "time_ratio": round(predicted.seconds / found["seconds"], 3),
        "seconds_by_cause": predicted.time.by_cause(),
        "peak_during": predicted.trace.memory.peak_during,
    }


def measure(point: Point, steps: int = STEPS) -> dict[str, float]:
    """Train in the layout: the largest peak of a rank, and the median step, the first one left out."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        task = {"point": asdict(point), "steps": steps}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // point.ranks)
        os.environ.update(MALLOC)
        run_ranks(WORKER, folder, point.ranks, TIMEOUT_SECONDS, threads)
        ranks = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("rank-*.json")]
    return {kind: max(rank[kind] for rank in ranks) for kind in ("bytes", "seconds")}


def order(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Of all pairs of layouts of one size whose measured times differ, how many are predicted in the right order."""
    right = pairs = 0
    for one, other in itertools.combinations(rows, 2):
        if one["size"] == other["size"] and abs(one["measured_seconds"] / other["measured_seconds"] - 1) > ALIKE:
            pairs += 1
            slower = one["measured_seconds"] > other["measured_seconds"]
            right += slower == (one["predicted_seconds"] > other["predicted_seconds"])
    return {"pairs": pairs, "right": right}


def train(folder: Path) -> None:
    """Be a rank: train a few steps on random tokens, and write the peak and the seconds of a step."""
    from moe_lm.data.batches import Batch
    from moe_lm.engine.build import build_engine, build_model
    from moe_lm.objective.training_loss import NextToken
    from moe_lm.parallel.topology import current_topology

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    point = Point(**task["point"])
    if point.stage:
        import deepspeed  # noqa: F401  # what it takes is no part of a model's memory
    config, topology = point.config(), current_topology()
    rows = config.train.rows_at_once(topology.world_size)
    ids = torch.randint(3, 4096, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(topology.rank))
    positions = torch.arange(LENGTH).repeat(rows, 1)
    bounds = torch.arange(0, rows * LENGTH + 1, LENGTH, dtype=torch.int32)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, bounds, LENGTH)
    start = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    built = build_model(config.model, config.parallel, topology)
    built.initialise(config.train.seed)
    engine = build_engine(built, NextToken(), config.train, config.parallel, pad_id=2)
    seconds = []
    for step in range(task["steps"]):
        started = time.perf_counter()
        engine.train_step(step, [batch] * (ROWS // topology.world_size // rows))
        seconds.append(time.perf_counter() - started)
    figures = {"bytes": _resident("VmHWM") - start, "seconds": statistics.median(seconds[1:])}
    (folder / f"rank-{topology.rank}.json").write_text(json.dumps(figures), encoding="utf-8")
    engine.close()


def _resident(name: str) -> int:
    """A line of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "task.json").is_file():
        train(Path(sys.argv[1]))
    else:
        main()
