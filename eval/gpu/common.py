"""What the parts of the GPU day share: their command line, results that are written at once, and a stopwatch."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.training import OptimizerConfig, TrainConfig
from moe_lm.data.batches import Batch, pack
from moe_lm.engine.build import build_engine, build_model
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import NextToken
from moe_lm.parallel.topology import Topology


@dataclass
class Part:
    """The command line of a part, and its figures so far."""

    device: torch.device
    seconds: float
    tiny: bool
    out: Path
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Add figures, and write all at once: what comes later may fail."""
        self.figures |= figures
        self.out.write_text(json.dumps(self.figures, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(figures), flush=True)

    def skip(self, why: str) -> NoReturn:
        self.note(skipped=why)
        sys.exit(0)


def begin(needs_cuda: bool = False) -> Part:
    """The part of this process. Skips it where a CUDA device is missing that it was started for, or that it needs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    part = Part(torch.device(arguments.device), arguments.seconds, arguments.tiny, arguments.out)
    if (part.device.type == "cuda" or needs_cuda) and not torch.cuda.is_available():
        part.skip("no CUDA device")
    return part


def median_seconds(step: Callable[[], object], device: torch.device, budget: float, least: int = 3) -> float:
    """The median time of a call, after two that are not counted, over as many as fit into `budget` seconds."""
    seconds: list[float] = []
    end = time.monotonic() + budget
    while len(seconds) < 2 + least or (time.monotonic() < end and len(seconds) < 200):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_batch(shape: ModelConfig, rows: int, length: int) -> Batch:
    """Random ids, a document a row. Real routing: the router decides where they go."""
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (rows, length + 1))
    return pack(ids[:, :-1].copy(), ids[:, 1:].copy(), np.arange(0, rows * length + 1, length))


def our_engine(shape: ModelConfig, device: torch.device, rows: int, accumulate: int = 1, **settings: Any) -> Engine:
    """The torch engine around a model with random weights, as `moe-lm pretrain` builds it."""
    train = TrainConfig(
        steps=1000,
        global_batch_size=rows * accumulate,
        micro_batch_size=rows,
        precision="bfloat16",
        optimizer=OptimizerConfig(name="adamw"),
        **settings,
    )
    parallel = ParallelConfig.model_validate({"device": device.type})
    built = build_model(shape, parallel, Topology())
    built.initialise(0)
    return build_engine(built, NextToken(), train, parallel, pad_id=-1)


def peak_gib(device: torch.device) -> float | None:
    """The most memory that tensors have taken on the device since the last call."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 3)


def first_that_runs(attempts: Sequence[tuple[str, Callable[[], Any]]]) -> tuple[str, Any] | str:
    """The name and the result of the first attempt that does not fail, or why the last one did."""
    why = "nothing to try"
    for name, attempt in attempts:
        try:
            return name, attempt()
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            why = f"{name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return why
