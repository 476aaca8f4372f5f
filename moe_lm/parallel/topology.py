"""Ranks and what they share: the world's size, rank 0's privileges, sums and barriers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Topology:
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows_of(self, global_batch_size: int) -> range:
        """The rows of the global batch that this rank computes."""
        share = global_batch_size // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)


def current_topology() -> Topology:
    """The topology that the launcher put into the environment; a single process without one."""
    return Topology(
        rank=int(os.environ.get("RANK", 0)),
        world_size=int(os.environ.get("WORLD_SIZE", 1)),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def leave() -> None:
    """Part from the other ranks; a process that ends without this may crash."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the tensor itself when there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank raised its flag, so that all act alike."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())


def on_rank_0(action: Callable[[], object], expected: tuple[type[Exception], ...]) -> None:
    """Run `action` on rank 0; every rank waits for it, and raises what it raised of the `expected` kinds."""
    error: Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except expected as raised:
            error = raised
    if dist.is_initialized():
        box = [error]
        dist.broadcast_object_list(box)
        error = box[0]
    if error is not None:
        raise error
