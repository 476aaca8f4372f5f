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
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import build_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import Recomputation
from moe_lm.data.batches import Batch
from moe_lm.tools.plan.devices import Device
from moe_lm.tools.plan.plan import device_here, tracer_of
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
LENGTH, ROWS = 256, 8  # of the global batch
STEPS = 3  # of which the first warms up
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TIMEOUT_SECONDS = 600
HERE = torch.device("cpu")
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
            "precision": "bfloat16",
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
    asked = [point for point in points() if arguments.only in point.name]
    for ranks in sorted({point.ranks for point in asked}):
        alike = [point for point in asked if point.ranks == ranks]
        for point, found in zip(alike, measure(alike), strict=True):
            rows.append(compare(point, found))
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


def compare(point: Point, found: Mapping[str, float]) -> dict[str, Any]:
    """Predicted over measured, of a layout."""
    config, device = point.config(), rates(point.size, point.ranks)
    predicted = estimate(config, point.ranks, device, tracer_of(config.model, "cpu"))
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


@cache
def rates(size: str, ranks: int) -> Device:
    """This machine, shared by so many ranks that train a model of this size; its rates are measured once."""
    config = Point(size, ranks, int(ranks > 1), "none").config()
    return device_here(config, config.model, ranks, HERE, None, ())


def measure(alike: Sequence[Point], steps: int = STEPS) -> list[dict[str, float]]:
    """Train in layouts of as many ranks: of each the largest peak of a rank, and its median step, the first left out.

    Ranks import what they need once, and fork a process for every layout.
    """
    (count,) = {point.ranks for point in alike}
    with TemporaryDirectory() as name:
        folder = Path(name)
        task = {"points": [asdict(point) for point in alike], "steps": steps}
        (folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        threads = max(1, (os.cpu_count() or 1) // count)
        with patch.dict(os.environ, MALLOC):
            run_ranks(WORKER, folder, count, TIMEOUT_SECONDS, threads)
        found = []
        for index in range(len(alike)):
            files = folder.glob(f"point-{index}-rank-*.json")
            ranks = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            found.append({kind: max(rank[kind] for rank in ranks) for kind in ("bytes", "seconds")})
    return found


def order(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Of all pairs of layouts of one size whose measured times differ, how many are predicted in the right order."""
    right = pairs = 0
    for one, other in itertools.combinations(rows, 2):
        if one["size"] == other["size"] and abs(one["measured_seconds"] / other["measured_seconds"] - 1) > ALIKE:
            pairs += 1
            slower = one["measured_seconds"] > other["measured_seconds"]
            right += slower == (one["predicted_seconds"] > other["predicted_seconds"])
    return {"pairs": pairs, "right": right}


def be_a_rank(folder: Path) -> None:
    """Train in every layout of the task, each in a process of its own."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    layouts = [Point(**values) for values in task["points"]]
    # What is imported, by an optimizer too, is no part of a model's memory.
    engines = {"moe_lm.engine.deepspeed_engine" if point.stage else "moe_lm.engine.torch_engine" for point in layouts}
    for name in ("torch._dynamo", *sorted(engines)):
        import_module(name)
    port = int(os.environ.get("MASTER_PORT", "0"))
    for index, point in enumerate(layouts):
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code:
                raise SystemExit(f"{point.name} failed with exit code {code}")
            continue
        os.environ["MASTER_PORT"] = str(port + index)
        train(point, task["steps"], folder / f"point-{index}-rank-{os.environ.get('RANK', '0')}.json")
        sys.stdout.flush()
        os._exit(0)


def train(point: Point, steps: int, output: Path) -> None:
    """Train a few steps on random tokens, and write the peak and the seconds of a step."""
    from moe_lm.engine.build import build_engine, build_model
    from moe_lm.objective.training_loss import NextToken
    from moe_lm.parallel.topology import current_topology

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _use_libraries()
    config, topology = point.config(), current_topology()
    rows = config.train.rows_at_once(topology.row_groups)
    batch = _batch(rows, LENGTH, topology.rank)
    gc.collect()
    start = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    built = build_model(config.model, config.parallel, topology)
    built.initialise(config.train.seed)
    engine = build_engine(built, NextToken(), config.train, config.parallel, pad_id=2)
    seconds = []
    for step in range(steps):
        started = time.perf_counter()
        engine.train_step(step, [batch] * (ROWS // topology.world_size // rows))
        seconds.append(time.perf_counter() - started)
    figures = {"bytes": _resident("VmHWM") - start, "seconds": statistics.median(seconds[1:])}
    output.write_text(json.dumps(figures), encoding="utf-8")
    engine.close()


def _use_libraries() -> None:
    """Train a tiny model for a step: the code of libraries that a step touches is no part of a model's memory.

    A resident set counts the pages of shared libraries, and the kernels that are made at their first use.
    """
    from moe_lm.engine.build import build_engine, build_model
    from moe_lm.objective.training_loss import NextToken
    from moe_lm.parallel.topology import Topology

    config = Point("small", 1, 0, "none").config()
    tiny = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    model = ModelConfig(**(SHAPE | tiny | {"vocab_size": 256}))
    train = config.train.model_copy(update={"global_batch_size": 1, "micro_batch_size": 1})
    built = build_model(model, config.parallel, Topology())
    built.initialise(1)
    build_engine(built, NextToken(), train, config.parallel, pad_id=2).train_step(0, [_batch(1, 64, 0, 256)])


def _batch(rows: int, length: int, seed: int, vocabulary: int = 4096) -> Batch:
    """Random tokens; every row is a document."""
    ids = torch.randint(3, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    bounds = torch.arange(0, rows * length + 1, length, dtype=torch.int32)
    return Batch(ids[:, :-1].int(), ids[:, 1:].int(), bounds, length)


def _resident(name: str) -> int:
    """A line of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "task.json").is_file():
        be_a_rank(Path(sys.argv[1]))
    else:
        main()
