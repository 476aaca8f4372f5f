"""One of two ranks that save and load together; run twice by test_checkpoint_death.py. Arguments: folder, rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from moe_lm.errors import MoeLmError
from moe_lm.train import checkpoint


def main(root: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root / 'rendezvous'}", rank=rank, world_size=2)
    checkpoints = root / "run" / "checkpoints"
    folder = checkpoint.save(checkpoints, 10, sharded(1, Shard(0)), {"config.yaml": "a: 1\n"})
    for placement in (Shard(0), Shard(1), Replicate()):
        loaded = sharded(0, placement)
        checkpoint.load(folder, loaded)
        for name, tensor in sharded(1, placement).items():
            assert torch.equal(local(loaded[name]), local(tensor)), (name, placement)
    expect_error(lambda: checkpoint.save(checkpoints, 20, sharded(1, Shard(0)), {"a": root / "absent"}), "absent")
    dist.barrier()
    if rank == 0:
        (folder / "config.yaml").write_text("a: 2\n")
    dist.barrier()
    expect_error(lambda: checkpoint.load(folder, sharded(0, Shard(0))), r"config\.yaml")
    dist.barrier()
    if rank == 0:
        (folder / "config.yaml").write_text("a: 1\n")
    dist.destroy_process_group()


def sharded(factor: int, placement: Placement) -> dict[str, torch.Tensor]:
    """Experts spread over the two ranks, and a norm that both hold."""
    mesh = init_device_mesh("cpu", (2,))
    experts = factor * torch.arange(24.0).view(4, 3, 2)
    state = {}
    for name, sign in (("model", 1), ("exp_avg", -1)):
        state[f"{name}.experts"] = distribute_tensor(sign * experts, mesh, [placement])
        state[f"{name}.norm"] = torch.full((5,), float(sign * factor))
    return state


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def expect_error(action: Callable[[], object], word: str) -> None:
    with pytest.raises(MoeLmError, match=word):
        action()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    os._exit(0)  # now and then the interpreter's own end aborts in a thread that gloo left behind
