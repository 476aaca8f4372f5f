"""A rank among ranks that are not there: exchanges have the right shapes, and nothing travels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from moe_lm.common.errors import UsageError


@contextmanager
def simulated_ranks(world_size: int, rank: int, on_wait: Callable[[object], None]) -> Iterator[None]:
    """Be `rank` of `world_size` within the context; `on_wait` is told which exchange is waited for.

    Raises UsageError in a process that has a process group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UsageError("a rank cannot be simulated within a run; do it in a process of its own")
    wait = FakeWork.wait

    def noted(work: FakeWork, *arguments: Any) -> bool:
        on_wait(work)
        return wait(work, *arguments)

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    FakeWork.wait = noted  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        FakeWork.wait = wait  # type: ignore[method-assign]
        dist.destroy_process_group()


def ranks_of(group: torch.ScriptObject | str) -> tuple[int, ...]:
    """The ranks of a group as operators of `torch.ops.c10d` are given it, or by name those of compiled graphs."""
    if isinstance(group, str):
        return tuple(dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(group)))  # type: ignore[arg-type]
    return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))


def unboxed(work: torch.ScriptObject) -> object:
    """What an operator of `torch.ops.c10d` returns to wait for, as `on_wait` is given it."""
    return dist.Work.unbox(work)
