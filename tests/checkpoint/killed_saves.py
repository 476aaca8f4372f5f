"""A process that saves until it is killed, many times over; run by test_checkpoint.py, prints what each kill left.

Arguments: folder, number of kills. One import of torch serves every kill: each saving process is forked.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from moe_lm.checkpoint import checkpoint, read, retain, write
from moe_lm.config.run import CheckpointConfig


def main(root: Path, kills: int) -> None:
    torch.set_num_threads(1)
    delays = random.Random(0)
    for number in range(kills):
        checkpoints = root / f"run-{number}"
        acknowledged = kill_while_saving(checkpoints, same_step=number % 2 == 1, delay=delays.uniform(0, 0.06))
        print(json.dumps(what_is_left(checkpoints, acknowledged)), flush=True)


def kill_while_saving(checkpoints: Path, same_step: bool, delay: float) -> int:
    """Fork a process that saves and cleans without end, kill it, and return the last value it saw saved."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for value in itertools.count(1):
            step = 1 if same_step else value
            write.save(checkpoints, step, state_of(value), {"trainer.json": str(value)})
            retain.clean(checkpoints, CheckpointConfig(keep=1))
            os.write(writer, f"{value}\n".encode())
    os.close(writer)
    received = os.read(reader, 1000)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(reader, 1000):
        received += more
    os.close(reader)
    return int(received.split()[-1])


def what_is_left(checkpoints: Path, acknowledged: int) -> dict[str, object]:
    leftovers = [path.name for path in checkpoints.glob("*.tmp")]
    folder = checkpoint.latest(checkpoints)
    assert folder is not None
    loaded = state_of(0)
    read.load(folder, loaded)
    value = int(checkpoint.read_text(folder, "trainer.json"))
    whole = all(torch.equal(tensor, state_of(value)[name]) for name, tensor in loaded.items())
    retain.clean(checkpoints, CheckpointConfig(keep=1))
    return {
        "acknowledged": acknowledged,
        "loaded": value,
        "whole": whole,
        "leftovers": leftovers,
        "after_clean": sorted(path.name for path in checkpoints.iterdir()),
        "latest_after_clean": str(checkpoint.latest(checkpoints)),
    }


def state_of(value: int) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((50, 50), float(value)), "exp_avg.weight": torch.full((50, 50), float(-value))}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
