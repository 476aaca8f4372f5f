"""Memory and time of a step beside what the simulated rank predicts: the 2B model, with each kind of recomputation.

The prediction is that of `moe-lm plan`, with the rates of the device's table. `ratio` is predicted over measured.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from common import begin, median_seconds, our_engine, peak_gib, random_batch

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config
from moe_lm.config.run import ParallelConfig
from moe_lm.tools.plan.devices import find_device
from moe_lm.tools.plan.predict import step_time
from moe_lm.tools.plan.simulate import simulate

HOUSE = Path(__file__).parents[3]
NAMES = {"H100": "h100", "H200": "h200", "A100": "a100-80", "B200": "b200"}

part = begin()


def main() -> None:
    config = load_config(ModelConfig, HOUSE / f"configs/model/{'anchor-20m' if part.tiny else 'deepseekmoe-2b'}.yaml")
    rows, length = (2, 64) if part.tiny else (8, 2048)
    for recompute in ("none", "selective", "full"):
        settings = {"activation_checkpointing": recompute, "compile": not part.tiny}
        engine = our_engine(config, part.device, rows, **settings)
        batch = random_batch(config, rows, length)
        found: dict[str, Any] = {"predicted": predicted(config, engine.config, length)}
        peak_gib(part.device)
        seconds = median_seconds(lambda e=engine, b=batch: e.train_step(100, [b]), part.device, part.seconds / 6)
        found["measured"] = {"seconds": round(seconds, 4), "gib": peak_gib(part.device)}
        found["ratio"] = {
            name: round(value / found["measured"][name], 3)
            for name, value in found["predicted"].items()
            if found["measured"][name]
        }
        part.note(**{recompute: found})
        del engine
        gc.collect()
        if part.device.type == "cuda":
            torch.cuda.empty_cache()


def predicted(config: ModelConfig, train: Any, length: int) -> dict[str, float]:
    """Seconds of a step, where the table has this device, and GiB of tensors: without what CUDA and NCCL take."""
    trace = simulate(config, train, ParallelConfig(), length, device=part.device.type)
    found = {"gib": round((trace.memory.peak - trace.memory.communication) / 2**30, 3)}
    if part.device.type == "cuda":
        name = next((known for word, known in NAMES.items() if word in torch.cuda.get_device_name()), None)
        if name is not None:
            found["seconds"] = round(step_time(trace, find_device(name)).seconds, 4)
    return found


main()
