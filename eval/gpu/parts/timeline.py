"""A profile of three training steps, for chrome://tracing, with the dearest kernels and the host's waits in figures."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from common import begin, our_engine, random_batch
from torch.profiler import ProfilerActivity, profile

from moe_lm.config.model import ModelConfig
from moe_lm.config.reading import load_config

HOUSE = Path(__file__).parents[3]

part = begin()


def main() -> None:
    config = load_config(ModelConfig, HOUSE / f"configs/model/{'anchor-20m' if part.tiny else 'deepseekmoe-2b'}.yaml")
    rows, length = (2, 64) if part.tiny else (8, 2048)
    cuda = part.device.type == "cuda"
    engine = our_engine(config, part.device, rows, compile=not part.tiny)
    batch = random_batch(config, rows, length)
    for _ in range(3):
        engine.train_step(100, [batch])
    if cuda:
        part.note(synchronisations_of_a_step=synchronisations(lambda: engine.train_step(100, [batch])))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        for _ in range(3):
            engine.train_step(100, [batch])
    trace = part.out.with_name("trace.chrome.json.gz")
    found.export_chrome_trace(str(trace))
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, time_of))
    total = sum(getattr(event, time_of) for event in events)
    part.note(
        trace=trace.name,
        milliseconds_a_step=round(total / 3e3, 2),
        dearest={
            event.key[:80]: f"{getattr(event, time_of) / total:.1%}, {event.count // 3} a step" for event in events[:25]
        },
    )


def synchronisations(step) -> list[str]:  # type: ignore[no-untyped-def]
    """What the host waits for in a step, as torch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    ]


main()
