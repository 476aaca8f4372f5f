"""Ranks and what they share: the world's size, rank 0's privileges, sums and barriers."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.parallel.meeting import end_meeting, meet

PATIENCE_SECONDS = 30.0  # that the back end has beyond the config's


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
    """The topology that the launcher put into the environment; a single process without one.

    Raises UsageError when a part of it is missing.
    """
    _name_ranks()
    if "WORLD_SIZE" not in os.environ and os.environ.get("RANK", "0") != "0":
        raise UsageError(
            f"RANK={os.environ['RANK']}, but WORLD_SIZE is not in the environment; start with a launcher (launch/), or "
            "take RANK away"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE={world_size}, but {' and '.join(missing)} is not in the environment; start with a launcher "
            "(launch/), or take WORLD_SIZE away"
        )
    return Topology(
        rank=int(os.environ.get("RANK", 0)),
        world_size=world_size,
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def _name_ranks() -> None:
    """Under `srun` or `mpirun`, which name ranks otherwise, fill what torch, Accelerate and DeepSpeed look for."""
    environment = os.environ
    if "RANK" in environment:
        return
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
        # Rank 0 is on the first node; SLURM_LAUNCH_NODE_IPADDR may be a login node, where only `srun` runs.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", environment.get("SLURM_STEP_NODELIST", ""))
        if first:
            environment.setdefault("MASTER_ADDR", first[1] + (first[2] or ""))
        environment.setdefault("MASTER_PORT", str(20000 + int(environment.get("SLURM_JOB_ID", 0)) % 10000))
    elif int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        names = {
            name: f"OMPI_COMM_WORLD_{name.removeprefix('WORLD_')}" for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
    else:
        return
    for name, theirs in names.items():
        if theirs in environment:
            environment.setdefault(name, environment[theirs])


def join(topology: Topology, device: torch.device, timeout_seconds: float) -> None:
    """Meet the other ranks, unless that is done. A single process gets a group of its own, which DeepSpeed wants.

    Raises MoeLmError when they are not all there in time.
    """
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watchdog, which knows more and says it in fewer words, comes first.
    timeout = timedelta(seconds=timeout_seconds + min(timeout_seconds, PATIENCE_SECONDS))
    store: dist.Store
    if topology.world_size == 1:
        store = dist.HashStore()
    else:
        store = dist.PrefixStore("group", meet(topology, timeout_seconds).notes)
    dist.init_process_group(backend, store=store, rank=topology.rank, world_size=topology.world_size, timeout=timeout)


def leave() -> None:
    """Part from the other ranks; a process that ends without this may crash."""
    if dist.is_initialized():
        dist.destroy_process_group()
    end_meeting()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the tensor itself when there is one."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank raised its flag, so that all act alike."""
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)).item())
