"""Saving and loading 400 MB of state: moe_lm's checkpoints beside `torch.save` and `torch.load`, in turns.

    python eval/bench/checkpoint.py [--folder FOLDER] [--output eval/results/checkpoint.json]

Ours is written with fsync and a checksum of every file, verified and loaded with that verification into tensors that
exist already, as a run that resumes has them. torch's has no checksum; it is saved with fsync and without, and loaded
into tensors of its own. The state is that of AdamW on a model of 33 million parameters in float32, with the tensors of
a transformer in size and number. Loads read from the page cache, in both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, write

LAYERS, HIDDEN, EXPERTS, WIDTH, VOCABULARY = 6, 512, 8, 256, 14_000
ROUNDS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder of temporary files")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_at_start = os.getloadavg()[0]
    with TemporaryDirectory(dir=arguments.folder) as folder:
        state = make_state()
        seconds = in_turns(turns(Path(folder), state), arguments.rounds)
    result = summary(seconds, state, load_at_start)
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_state() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {f"layers.{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"layers.{layer}.mlp.experts.{name}": (EXPERTS, HIDDEN, WIDTH) for name in ("gate", "up")}
        shapes |= {f"layers.{layer}.{name}.weight": (HIDDEN,) for name in ("input_norm", "post_attention_norm")}
    return {
        f"{kind}.{name}": torch.randn(shape, generator=draw)
        for kind in ("model", "exp_avg", "exp_avg_sq")
        for name, shape in shapes.items()
    }


class Turn(NamedTuple):
    """Something to time, and what a save has to replace before that, so that every save writes new files."""

    action: Callable[[], object]
    replaced: Path | None = None


def turns(folder: Path, state: dict[str, Tensor]) -> dict[str, Turn]:
    """What is timed, in this order."""
    ours, theirs = folder / "checkpoints", folder / "state.pt"
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    newest = ours / "step-00000001"

    def torch_save(sync: bool) -> None:
        with theirs.open("wb") as file:
            torch.save(state, file)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    return {
        "ours_save_with_fsync": Turn(lambda: write.save(ours, 1, state, {"config.yaml": "a: 1\n"}), newest),
        "torch_save": Turn(lambda: torch_save(sync=False), theirs),
        "torch_save_with_fsync": Turn(lambda: torch_save(sync=True), theirs),
        "ours_verify": Turn(lambda: checkpoint.verify(newest)),
        "ours_load_with_verify": Turn(lambda: read.load(newest, target)),
        "torch_load": Turn(lambda: torch.load(theirs)),
    }


def in_turns(timed: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds of every action in every round but the first, which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, (action, replaced) in timed.items():
            if replaced is not None and replaced.is_dir():
                shutil.rmtree(replaced)
            elif replaced is not None:
                replaced.unlink(missing_ok=True)
            os.sync()  # what others wrote is not paid for here
            started = time.perf_counter()
            found = action()
            if number:
                seconds[name].append(time.perf_counter() - started)
            del found
    return seconds


def summary(seconds: dict[str, list[float]], state: dict[str, Tensor], load_at_start: float) -> dict[str, Any]:
    median = {name: statistics.median(found) for name, found in seconds.items()}
    pairs = {
        "save": ("ours_save_with_fsync", "torch_save"),
        "save_both_with_fsync": ("ours_save_with_fsync", "torch_save_with_fsync"),
        "load": ("ours_load_with_verify", "torch_load"),
    }
    return {
        "megabytes": round(sum(tensor.nbytes for tensor in state.values()) / 1e6, 1),
        "tensors": len(state),
        "median_seconds": {name: round(value, 3) for name, value in median.items()},
        "least_seconds": {name: round(min(found), 3) for name, found in seconds.items()},
        "times_as_fast_as_torch": {
            name: round(median[theirs] / median[ours], 2) for name, (ours, theirs) in pairs.items()
        },
        "rounds": len(next(iter(seconds.values()))),
        "torch": torch.__version__,
        "xxhash": xxhash.VERSION,
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_at_the_start": round(load_at_start, 2),
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
