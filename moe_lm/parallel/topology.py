"""The place of this process among the ranks of a run, as its launcher put it into the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_lm.common.errors import UsageError

MOST_HOSTS = 4  # that a sentence names


@dataclass(frozen=True)
class Topology:
    """The rank of this process and the number of ranks; `hosts` by rank, once the ranks have met."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    hosts: tuple[str, ...] = ()
    sequence_parallel_size: int = 1  # neighbouring ranks that share the rows of the batch

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def ranks_on_this_host(self) -> int:
        """By the names of the hosts; all, while they are unknown. Libraries overwrite LOCAL_WORLD_SIZE."""
        return self.hosts.count(self.hosts[self.rank]) if self.hosts else self.world_size

    @property
    def row_groups(self) -> int:
        """Groups of ranks with rows of their own; without sequence parallelism each rank is one."""
        return self.world_size // self.sequence_parallel_size

    @property
    def row_group(self) -> int:
        return self.rank // self.sequence_parallel_size

    def check_groups(self, setting: str, size: int) -> None:
        """Raise UsageError when the ranks cannot be divided into groups of the `size` that a setting asks for."""
        if self.world_size % size:
            fault = (
                f"does not divide the {self.world_size} processes of this run; choose a divisor, or start a multiple"
            )
            if self.world_size == 1:
                fault = (
                    f"needs a multiple of {size} processes, and this run has 1; start it with --gpus {size}, "
                    f"--processes {size} on a CPU, or a launcher (docs/parallelism.md)"
                )
            raise UsageError(f"{setting}={size} {fault}", common=True)

    def rows_of(self, global_batch_size: int) -> range:
        """The rows of the global batch that this rank computes, with the others of its group."""
        share = global_batch_size // self.row_groups
        return range(self.row_group * share, (self.row_group + 1) * share)

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank stands for its host, where all ranks run the same code."""
        return not self.hosts or self.hosts.index(self.hosts[self.rank]) == self.rank

    def named(self, ranks: Sequence[int]) -> str:
        """`rank 3 on host-b` or `ranks 4, 5 and 8 to 15 on host-c`; without the host while it is unknown."""
        words = "rank" if len(ranks) == 1 else "ranks"
        *most, last = _spans(ranks)
        names = f"{words} {', '.join(most)} and {last}" if most else f"{words} {last}"
        hosts = list(dict.fromkeys(self.hosts[rank] for rank in ranks if rank < len(self.hosts)))
        if len(hosts) > MOST_HOSTS:
            hosts[MOST_HOSTS - 1 :] = [f"{hosts[MOST_HOSTS - 1]} and {len(hosts) - MOST_HOSTS} more hosts"]
        return f"{names} on {', '.join(hosts)}" if hosts else names


def _spans(ranks: Sequence[int]) -> list[str]:
    """`["1", "4 to 9"]`: of three or more in a row, the first and the last."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    return [text for span in spans for text in ([f"{span[0]} to {span[-1]}"] if len(span) > 2 else map(str, span))]


def current_topology() -> Topology:
    """The topology in the environment; a single process if there is none. Raises UsageError if a part is missing."""
    _translate_launcher()
    if "WORLD_SIZE" not in os.environ and os.environ.get("RANK", "0") != "0":
        raise UsageError(
            f"RANK={os.environ['RANK']}, but WORLD_SIZE is not in the environment; start with a launcher (launch/), or "
            "unset RANK"
        )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if world_size > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE={world_size}, but {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the "
            "environment; start with a launcher (launch/), or unset WORLD_SIZE"
        )
    return Topology(int(os.environ.get("RANK", 0)), world_size, int(os.environ.get("LOCAL_RANK", 0)))


def _translate_launcher() -> None:
    """Under `srun` or `mpirun`, set the variables that torch, Accelerate and DeepSpeed read."""
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
