"""Saves under every layout, loads under every other; run by test_checkpoint_layouts.py. Argument: a folder.

Prints a JSON line for each load. One import of torch serves all ranks: each is forked.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch  # noqa: F401 - with the next, imported late by DTensors: here once for all ranks
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moe_lm.checkpoint import read, write
from moe_lm.parallel.logical import divide, divide_experts, undivide

EXPERTS = "layers.0.mlp.experts.down"
SHAPES = {
    EXPERTS: (6, 4, 3),
    "layers.1.mlp.experts.odd": (6, 3, 5),  # its second dimension does not divide
    "embed": (1024, 8),
    "five": (5, 3),  # 2, 2, 1 and no rows over 4 ranks
    "three": (3,),
    "two": (2, 5),  # over 2 x 2 ranks the second of each pair has none
    "one": (1,),
    "scalar": (),
}
# Processes, expert-parallel size, and whether even what does not divide evenly is divided.
LAYOUTS = {
    "one process": (1, 1, False),
    "2 ranks, EP 2": (2, 2, False),
    "4 ranks, EP 2": (4, 2, False),
    "4 ranks, uneven, EP 2": (4, 2, True),
    "4 ranks, uneven, EP 1": (4, 1, True),
}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    for action in (save, load):
        for world_size in (4, 2, 1):
            fork(world_size, root / f"{action.__name__}-{world_size}", lambda: action(root))  # noqa: B023 - at once


def save(root: Path) -> None:
    for name, state in states():
        write.save(root / name, 1, state, {})


def load(root: Path) -> None:
    for name, expected in states():
        for saved in LAYOUTS:
            loaded = {key: torch.zeros_like(tensor) for key, tensor in expected.items()}
            read.load(root / saved / "step-00000001", loaded)
            differ = [key for key in expected if not torch.equal(local(loaded[key]), local(expected[key]))]
            result = json.dumps({"saved": saved, "loaded": name, "differ": differ})
            os.write(1, f"{result}\n".encode())  # one write, whatever the other ranks print


def states() -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The state of every layout of this many ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for name, (world_size, expert_parallel_size, uneven) in LAYOUTS.items():
        if world_size == ranks:
            yield name, state_of(expert_parallel_size, uneven)


def state_of(expert_parallel_size: int, uneven: bool) -> dict[str, Tensor]:
    whole = {
        f"{kind}.{name}": torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + offset
        for offset, kind in enumerate(("model", "exp_avg"), 1)
        for name, shape in SHAPES.items()
    }
    if not dist.is_initialized():
        return whole
    ranks = torch.arange(dist.get_world_size()).view(-1, expert_parallel_size)
    mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("data", "expert"))
    if uneven:
        # Experts over `expert` first: the dimensions of a mesh divide from left to right.
        turned = DeviceMesh("cpu", ranks.T, mesh_dim_names=("expert", "data"))
        return {name: distribute(tensor, turned if "experts" in name else mesh) for name, tensor in whole.items()}
    flat, state = DeviceMesh("cpu", ranks.flatten()), {}
    for name, tensor in whole.items():
        expert = "experts" in name
        kept = tensor.chunk(expert_parallel_size)[mesh.get_local_rank("expert")] if expert else tensor
        state[name] = divide_experts(kept, mesh) if expert else divide(kept, flat)
        assert torch.equal(undivide(state[name], expert), kept)
    assert isinstance(state[f"model.{EXPERTS}"], DTensor)
    assert isinstance(state["model.embed"], DTensor)
    return state


def distribute(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(tensor, mesh, [Shard(0) if tensor.ndim else Replicate()] * mesh.ndim)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fork(world_size: int, rendezvous: Path, action: Callable[[], None]) -> None:
    """Run `action` in so many processes; 1 has no process group."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            try:
                if world_size > 1:
                    meeting = f"file://{rendezvous}"
                    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
                action()
                if world_size > 1:
                    dist.destroy_process_group()
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a rank of {world_size} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
