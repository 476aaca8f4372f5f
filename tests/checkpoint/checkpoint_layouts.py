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

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.checkpoint import read, write
from moe_lm.parallel import logical
from moe_lm.parallel.logical import Piece, piece_of

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
# Processes, expert-parallel size, and whether the ranks' runs are of unequal length.
LAYOUTS = {
    "one process": (1, 1, False),
    "2 ranks, EP 2": (2, 2, False),
    "4 ranks, EP 2": (4, 2, False),
    "4 ranks, uneven, EP 2": (4, 2, True),
    "4 ranks, uneven, EP 1": (4, 1, True),
}


def main(root: Path) -> None:
    torch.set_num_threads(1)
    logical.SMALL = 1 << 10  # bytes
    for action in (save, load):
        for world_size in (4, 2, 1):
            fork(world_size, root / f"{action.__name__}-{world_size}", lambda: action(root))  # noqa: B023 - at once


def save(root: Path) -> None:
    for name, state in states():
        write.save(root / name, 1, state, {})


def load(root: Path) -> None:
    for name, expected in states():
        for saved in LAYOUTS:
            loaded = {key: emptied(tensor) for key, tensor in expected.items()}
            read.load(root / saved / "step-00000001", loaded)
            differ = [key for key in expected if not equal(loaded[key], expected[key])]
            result = json.dumps({"saved": saved, "loaded": name, "differ": differ})
            os.write(1, f"{result}\n".encode())  # one write, whatever the other ranks print


def states() -> Iterator[tuple[str, dict[str, Tensor | Piece]]]:
    """The state of every layout of this many ranks."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for name, (world_size, expert_parallel_size, uneven) in LAYOUTS.items():
        if world_size == ranks:
            yield name, state_of(expert_parallel_size, uneven)


def state_of(expert_parallel_size: int, uneven: bool) -> dict[str, Tensor | Piece]:
    whole = {
        f"{kind}.{name}": torch.arange(math.prod(shape), dtype=torch.float32).view(shape) + offset
        for offset, kind in enumerate(("model", "exp_avg"), 1)
        for name, shape in SHAPES.items()
    }
    if not dist.is_initialized():
        return dict(whole)
    rank, size = dist.get_rank(), dist.get_world_size()
    state: dict[str, Tensor | Piece] = {}
    for name, tensor in whole.items():
        if "experts" in name:  # a share of the experts, and of these a run
            experts = len(tensor) // expert_parallel_size
            number, copy = rank % expert_parallel_size, rank // expert_parallel_size
            stack = tensor[number * experts : (number + 1) * experts].clone()
            piece = piece_of(stack)._replace(start=number * stack.numel(), shape=tuple(tensor.shape))
            state[name] = run_of(piece, copy, size // expert_parallel_size, uneven)
        elif uneven or name.endswith("embed"):
            state[name] = run_of(piece_of(tensor), rank, size, uneven)
        else:
            state[name] = tensor
    return state


def run_of(piece: Piece, rank: int, size: int, uneven: bool) -> Piece:
    bounds = [
        piece.size * number**2 // size**2 if uneven else piece.size * number // size for number in range(size + 1)
    ]
    return piece.cut(bounds[rank], bounds[rank + 1])


def emptied(tensor: Tensor | Piece) -> Tensor | Piece:
    if isinstance(tensor, Piece):
        return tensor._replace(views=tuple(torch.zeros_like(view) for view in tensor.views))
    return torch.zeros_like(tensor)


def equal(one: Tensor | Piece, other: Tensor | Piece) -> bool:
    return all(torch.equal(*views) for views in zip(piece_of(one).views, piece_of(other).views, strict=True))


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
