"""The process group of a run: joining and leaving it, sums over its ranks, and work that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.meeting import Meeting

PATIENCE_SECONDS = 30.0  # that the back end has beyond the config's timeout

T = TypeVar("T")


def join(meeting: Meeting, device: torch.device, timeout_seconds: float) -> None:
    """Meet the other ranks and form the process group, unless there is one; a single process, for DeepSpeed, its own.

    Raises MoeLmError if a rank does not come in time.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watchdog, which knows more and says it in fewer words, comes first.
    timeout = timedelta(seconds=timeout_seconds + min(timeout_seconds, PATIENCE_SECONDS))
    rank, world_size = meeting.topology.rank, meeting.topology.world_size
    store = dist.HashStore() if world_size == 1 else dist.PrefixStore("group", meeting.assemble(timeout_seconds))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave() -> None:
    """Leave the process group; a process that ends without this may crash."""
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the tensor itself in a single process."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank raised its flag, so that all act alike."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())


@dataclass(frozen=True)
class Ranks:
    """Ranks that act together: all those of the run, or the single process.

    A thread beside the training speaks through a `group` of its own.
    """

    group: dist.ProcessGroup | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def each(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> list[T]:
        """Run `action` on every rank, wait for all, and return the result of each.

        If it raises one of the `expected` kinds anywhere, every rank raises the error of the first such rank.
        """
        mine: T | None = None
        error: Exception | None = None
        try:
            mine = action()
        except expected as raised:
            error = raised
        outcomes = [(mine, error)]
        if dist.is_initialized():
            outcomes = [(None, None)] * self.size
            dist.all_gather_object(outcomes, (mine, error), group=self.group)
        for _, error in outcomes:
            if error is not None:
                if isinstance(error, MoeLmError):
                    error.common = True
                raise error
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def first(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> T:
        """Run `action` on rank 0 only; every rank waits for it, and returns its result or raises its error."""
        return self.each(lambda: action() if self.rank == 0 else None, expected)[0]  # type: ignore[return-value]

    @classmethod
    def with_own_group(cls) -> Ranks:
        """All ranks, with a group for a thread beside the training; every rank calls this at the same point."""
        return cls(dist.new_group(backend="gloo") if dist.is_initialized() else None)

    def close(self) -> None:
        """Give up the group of their own."""
        if self.group is not None:
            dist.destroy_process_group(self.group)
