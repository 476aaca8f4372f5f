"""The process group of a run: joining and leaving it, sums over its ranks, and work that they share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.meeting import Meeting

PATIENCE_SECONDS = 30.0  # that the back end has beyond the config's timeout
FLIGHT_RECORDER = "nccl_trace_rank_"  # the files' prefix that torchfrtrace expects

T = TypeVar("T")


def join(meeting: Meeting, device: torch.device, timeout_seconds: float) -> None:
    """Meet the other ranks and form the process group, unless there is one; a single process, for DeepSpeed, its own.

    On GPUs NCCL connects at once, bound to the device, and communicators of parts of the ranks are split from that one.
    Beside it gloo serves tensors of the host: what ranks tell each other, and checkpoints; `with_own_group` makes one
    more for the thread that saves. The groups of expert, sequence and data parallelism, of DeviceMesh and of DeepSpeed,
    inherit both. A rank connects to another over gloo when it first speaks to it there (TORCH_GLOO_LAZY_INIT,
    common/environment.py), so that groups which nobody uses cost nothing.

    Raises MoeLmError if a rank does not come in time.
    """
    # Of names that torch 2.13 gives collectives, which older versions, and DeepSpeed, do not know.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watchdog, which knows more and says it in fewer words, comes first.
    timeout = timedelta(seconds=timeout_seconds + PATIENCE_SECONDS)
    rank, world_size = meeting.topology.rank, meeting.topology.world_size
    store = dist.HashStore() if world_size == 1 else dist.PrefixStore("group", meeting.assemble(timeout_seconds))
    bound = device if device.type == "cuda" and world_size > 1 else None  # alone there is nobody to connect to
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=bound)


def record_flight(folder: Path) -> None:
    """Have NCCL write the collectives that it remembers (common/environment.py) into `folder` when one times out.

    Call this before the process group is made; `torchfrtrace` reads the files. What a person has set is left as it is.
    """
    prefix = str(folder.absolute() / FLIGHT_RECORDER)
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):  # its name since torch 2.9, and before
        os.environ.setdefault(name, prefix)


def dump_flight_recorder(rank: int) -> None:
    """Write what NCCL remembers, before the process ends without waiting for its timeout."""
    prefix = os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
    if prefix is not None and dist.is_nccl_available():
        with suppress(OSError, RuntimeError):
            Path(f"{prefix}{rank}").write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]


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

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the ranks, in its place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def swap(self, sent: Tensor, sizes: list[int], arriving: list[int]) -> Tensor:
        """Send `sizes` elements of a flat tensor to each rank; what arrives from each, in order."""
        if self.size == 1:
            return sent
        received = sent.new_empty(sum(arriving))
        dist.all_to_all_single(received, sent, arriving, sizes, group=self.group)
        return received

    def collect(self, tensor: Tensor) -> Tensor:
        """The flat tensors of all ranks, which have one size, in order."""
        if self.size == 1:
            return tensor
        everywhere = tensor.new_empty(self.size * len(tensor))
        dist.all_gather_into_tensor(everywhere, tensor, group=self.group)
        return everywhere

    def each(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> list[T]:
        """Run `action` on every rank, wait for all, and return the result of each.

        If it raises one of the `expected` kinds anywhere, every rank raises the error of the first such rank.
        """
        outcomes = [_attempt(action, expected)]
        if self.size > 1:
            mine, outcomes = outcomes[0], outcomes * self.size
            dist.all_gather_object(outcomes, mine, group=self.group)
        return _results(outcomes)

    def first(self, action: Callable[[], T], expected: tuple[type[Exception], ...]) -> T:
        """Run `action` on rank 0 only; every rank waits for it, and returns its result or raises its error."""
        outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            outcome = [_attempt(action, expected)]
        if self.size > 1:  # not from each to each, of which only one would be read
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        return _results(outcome)[0]

    def to_first(self, value: T) -> list[T] | None:
        """The values of all ranks, on rank 0; None on the others."""
        if not dist.is_initialized():
            return [value]
        values: list[T] | None = [value] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.group, group_dst=0)
        return values

    @classmethod
    def with_own_group(cls, timeout_seconds: float | None = None) -> Ranks:
        """All ranks, with a group whose ranks wait this long for each other; every rank calls this at the same point.

        A thread beside the training needs one of its own.
        """
        if not dist.is_initialized():
            return cls()
        timeout = None if timeout_seconds is None else timedelta(seconds=timeout_seconds + PATIENCE_SECONDS)
        return cls(dist.new_group(backend="gloo", timeout=timeout))

    def close(self) -> None:
        """Give up the group of their own."""
        if self.group is not None:
            dist.destroy_process_group(self.group)


def _attempt(action: Callable[[], T], expected: tuple[type[Exception], ...]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except expected as error:
        return None, error


def _results(outcomes: list[tuple[T | None, Exception | None]]) -> list[T]:
    """The results; raises the first error instead, which all ranks have in common."""
    for _, error in outcomes:
        if error is not None:
            if isinstance(error, MoeLmError):
                error.common = True
            raise error
    return [result for result, _ in outcomes]  # type: ignore[misc]
