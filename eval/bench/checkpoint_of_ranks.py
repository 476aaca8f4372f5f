"""A checkpoint of 2 GB over four ranks: moe_lm's beside `torch.distributed.checkpoint`, in turns.

    python -m eval.bench.checkpoint_of_ranks [--folder FOLDER] [--output eval/results/checkpoint_of_ranks.json]

The ranks are processes that speak through gloo, and keep a state as ZeRO 3 divides it: of each tensor a quarter of the
elements. torch's keeps the same quarters as DTensors and writes them with its `FileSystemWriter`, without checksums.
Both bring their files onto the disk. Ours hashes what it writes, and verifies it apart from loading.
A time is that of the slowest rank; loads read from the page cache. Memory is what a rank's peak rises by, as a share of
its part of the state.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.parallel.logical import Piece

RANKS, LAYERS, HIDDEN, EXPERTS, WIDTH, VOCABULARY = 4, 12, 768, 16, 256, 16_000
KINDS = ("model", "exp_avg", "exp_avg_sq")
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where to write; default: the folder of temporary files")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    with TemporaryDirectory(dir=arguments.folder) as folder:
        mp.start_processes(run_rank, (folder, arguments.rounds), nprocs=RANKS, start_method="fork")
        result = json.loads((Path(folder) / "found.json").read_text())
    result |= {
        "ranks": RANKS,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load_average": [round(load_at_start, 2), round(os.getloadavg()[0], 2)],
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, HIDDEN), "head": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        found |= {f"layers.{layer}.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"layers.{layer}.experts.{name}": (EXPERTS, HIDDEN, WIDTH) for name in ("gate", "up", "down")}
        found |= {f"layers.{layer}.{name}": (HIDDEN,) for name in ("input_norm", "post_attention_norm")}
    return found


def run_rank(rank: int, folder: str, rounds: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    draw = torch.Generator().manual_seed(rank)
    quarters: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for kind in KINDS:
        for name, shape in shapes().items():
            quarters[f"{kind}.{name}"] = torch.rand(math.prod(shape) // RANKS, generator=draw), shape
    ours = {name: Piece((flat,), rank * len(flat), shape) for name, (flat, shape) in quarters.items()}
    theirs = {
        name: DTensor.from_local(flat.view(shape[0] // RANKS, *shape[1:]), mesh, [Shard(0)], run_check=False)
        for name, (flat, shape) in quarters.items()
    }
    bytes_here = sum(flat.nbytes for flat, _ in quarters.values())
    root, share = Path(folder), slice(rank, None, RANKS)
    step, torchs, plans = root / "step-00000001", root / "torch", write.Plans()
    timed: dict[str, Callable[[], object]] = {
        "save": lambda: write.save(root, 1, ours, {}, plans=plans),
        "torch_save": lambda: dcp.save(theirs, storage_writer=dcp.FileSystemWriter(torchs)),
        "verify": lambda: checkpoint.verify(step, share=share),
        "load": lambda: read.load(step, ours, verified=True),
        "torch_load": lambda: dcp.load(theirs, storage_reader=dcp.FileSystemReader(torchs)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    memory = dict.fromkeys(timed, 0.0)
    before = {name: float(flat.double().sum()) for name, (flat, _) in quarters.items()}
    for number in range(rounds + 1):
        for name, action in timed.items():
            if rank == 0:
                shutil.rmtree(
                    {"save": step, "torch_save": torchs}.get(name, root / "none"),
                    ignore_errors=True,
                )
                os.sync()  # what others wrote is not paid for here
            if name.endswith("load"):
                for flat, _ in quarters.values():
                    flat.zero_()
            dist.barrier()
            at_rest = reset_peak()
            started = time.perf_counter()
            action()
            took = torch.tensor([time.perf_counter() - started, (peak() - at_rest) / bytes_here])
            if name.endswith("load"):
                assert before == {name: float(flat.double().sum()) for name, (flat, _) in quarters.items()}
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if number:
                seconds[name].append(float(took[0]))
                memory[name] = max(memory[name], float(took[1]))
    if rank == 0:
        (root / "found.json").write_text(json.dumps(summary(seconds, memory, RANKS * bytes_here)))
    dist.barrier()
    dist.destroy_process_group()


def summary(seconds: dict[str, list[float]], memory: dict[str, float], state_bytes: int) -> dict[str, Any]:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    pairs = {"save": "torch_save", "verify": "torch_load", "load": "torch_load"}
    return {
        "megabytes": round(state_bytes / 1e6),
        "median_seconds": {name: round(value, 3) for name, value in median.items()},
        "least_seconds": {name: round(min(found), 3) for name, found in seconds.items()},
        "of_torchs_time": {name: round(median[name] / median[other], 2) for name, other in pairs.items()},
        "peak_memory_of_the_state": {name: round(value, 3) for name, value in memory.items()},
        "rounds": len(seconds["save"]),
    }


def reset_peak() -> int:
    """Begin to measure the peak anew; returns the bytes in memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
