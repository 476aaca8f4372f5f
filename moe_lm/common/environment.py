"""The environment of a process that trains, in one place, whatever starts it; what is set already stays as it is.

A rank sets these variables before it imports torch, and keeps to the cores near its GPU. `moe-lm doctor` shows them.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from moe_lm.common.process import cores, open_files

REMOTE = re.compile(r"nfs|lustre|gpfs|beegfs|cifs|smb|ceph|fuse|9p|afs|wekafs")  # types of file systems
MOUNTS = Path("/proc/self/mounts")
DEVICES = Path("/sys")
GPUS = Path("/proc/driver/nvidia/gpus")


class Machine(NamedTuple):
    """What values depend on: the cores of this host, and the ranks that share them; 0 without a launcher."""

    cores: int
    ranks: int

    @property
    def cores_of_rank(self) -> int:
        """A rank's share of this host, or of Slurm's task, which is a rank or an agent that starts several."""
        cores, slurm = self.cores, os.environ if "SLURM_STEP_ID" in os.environ else {}
        if own := slurm.get("SLURM_CPUS_PER_TASK"):  # `cores` may be those of this task alone
            cores = min(cores, int(own)) * (_leading_number(slurm.get("SLURM_STEP_TASKS_PER_NODE", "")) or 1)
        return max(1, cores // max(1, self.ranks))


class Variable(NamedTuple):
    """A variable of the environment; without a value, torch's own default is right."""

    names: tuple[str, ...]  # the one that is set, and others that mean the same
    value: Callable[[Machine], str | None]
    why: str


class Setting(NamedTuple):
    """A variable that is set: to what, why, and whether it was set before."""

    name: str
    value: str
    why: str
    is_given: bool


def _always(value: str) -> Callable[[Machine], str]:
    return lambda _: value


def _of_ranks(value: str) -> Callable[[Machine], str | None]:
    return lambda machine: value if machine.ranks else None


def _cores_of_rank(most: int) -> Callable[[Machine], str | None]:
    return lambda machine: str(min(most, machine.cores_of_rank)) if machine.ranks else None


def _cached(name: str) -> Callable[[Machine], str | None]:
    def folder(_: Machine) -> str | None:
        try:
            return str(local_cache() / name)
        except (OSError, RuntimeError):  # no home folder
            return None

    return folder


def _allocator() -> tuple[str, ...]:
    """Its variable's name since torch 2.9, and before; the newer one, which older versions do not read, comes last."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    try:
        major, minor = importlib.metadata.version("torch").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return names
    return names if (int(major), int(minor)) < (2, 9) else names[::-1]


VARIABLES = (
    Variable(("OMP_NUM_THREADS",), _cores_of_rank(1 << 20), "the cores of a rank"),
    Variable(_allocator(), _always("expandable_segments:True"), "the shapes of experts change with every step"),
    Variable(("TORCHINDUCTOR_CACHE_DIR",), _cached("inductor"), "compiled once a host, on its own disk"),
    Variable(("TRITON_CACHE_DIR",), _cached("triton"), "compiled once a host, on its own disk"),
    Variable(("TORCHINDUCTOR_COMPILE_THREADS",), _cores_of_rank(32), "the cores of a rank, at most 32"),
    Variable(("TORCH_GLOO_LAZY_INIT",), _of_ranks("1"), "no connection to a rank that none speaks to"),
    Variable(("TORCH_FR_BUFFER_SIZE",), _of_ranks("2000"), "collectives that NCCL remembers, to tell which one hung"),
    Variable(("TORCH_NCCL_DUMP_ON_TIMEOUT",), _of_ranks("1"), "and writes when one times out"),
    Variable(("TORCH_CPP_LOG_LEVEL",), _of_ranks("ERROR"), "warnings of lost connections would hide who was lost"),
)
AGENT_VARIABLES = (
    Variable(("OMP_NUM_THREADS",), _cores_of_rank(1 << 20), "the cores of a rank"),  # else torchrun takes one
    Variable(("TORCH_ELASTIC_SHUTDOWN_TIMEOUT",), _always("300"), "seconds for a step and a checkpoint"),
    # With torch's default, an agent that takes a lost one's place waits for an address that the others never send.
    Variable(("TORCH_DISABLE_SHARE_RDZV_TCP_STORE",), _always("1"), "a lost machine's place can be taken"),
)


def prepare(bound: bool = True) -> None:
    """Set what is not set yet, raise the limit of open files, and have a launcher's rank `bound` to its cores.

    Call it before torch is imported.
    """
    open_files()
    machine = Machine(cores(), ranks_here())
    put(VARIABLES, machine)
    if bound and machine.ranks > 1 and (own := near(local_rank(), machine.ranks)):
        os.sched_setaffinity(0, own)


def put(variables: tuple[Variable, ...], machine: Machine) -> None:
    """Put into the environment what is not there."""
    os.environ.update({setting.name: setting.value for setting in settings(variables, machine) if not setting.is_given})


def settings(variables: tuple[Variable, ...], machine: Machine) -> Iterator[Setting]:
    """The variables of a process on this machine, those that are set already among them."""
    for variable in variables:
        given = next((name for name in variable.names if name in os.environ), None)
        value = variable.value(machine)
        if given is not None:
            yield Setting(given, os.environ[given], variable.why, True)
        elif value is not None:
            yield Setting(variable.names[0], value, variable.why, False)


def ranks_here() -> int:
    """The ranks that a launcher started on this host; of all hosts if it does not say, 0 if there is none."""
    environment = os.environ
    slurm = environment if "SLURM_STEP_ID" in environment else {}
    world = environment.get("WORLD_SIZE") or slurm.get("SLURM_NTASKS") or environment.get("OMPI_COMM_WORLD_SIZE")
    if not world or not world.isdecimal() or int(world) < 2:
        return 0
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        if found := _leading_number(environment.get(name, "")):
            return found
    return int(world)


def _leading_number(text: str) -> int | None:
    """The 8 of Slurm's `8(x2)`."""
    found = re.match(r"\d+", text)
    return None if found is None else int(found[0])


def local_rank() -> int:
    """The number of this rank among those of its host."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), 0)


def near(rank: int, ranks: int) -> set[int]:
    """The cores of the NUMA node of a rank's GPU, or of its share of the nodes; empty if there is no choice.

    There is none either where somebody has bound the rank already.
    """
    nodes = [_numbers(file) for file in sorted(DEVICES.glob("devices/system/node/node[0-9]*/cpulist"), key=_number)]
    if len(nodes) < 2 or not hasattr(os, "sched_setaffinity") or os.sched_getaffinity(0) != set[int]().union(*nodes):
        return set()
    addresses = sorted(folder.name for folder in GPUS.glob("*"))
    if len(addresses) < ranks or "CUDA_VISIBLE_DEVICES" in os.environ:
        return nodes[rank * len(nodes) // ranks] if not addresses else set()
    file = DEVICES / "bus/pci/devices" / addresses[rank] / "numa_node"
    try:
        node = int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return set()
    return nodes[node] if 0 <= node < len(nodes) else set()


def local_cache() -> Path:
    """The folder for what is compiled: in the user's cache, or where that is on a shared disk, beside temporary files.

    Raises RuntimeError for a user without a home folder, OSError if the folder is somebody else's.
    """
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home) / "moe-lm"
    cache, beside = Path.home() / ".cache", Path(tempfile.gettempdir())
    if not _is_remote(cache) or _is_remote(beside):
        return cache / "moe-lm"
    own = beside / f"moe-lm-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    found = own.lstat()
    if own.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{own} is not this user's alone; XDG_CACHE_HOME can name another folder")
    return own


def _is_remote(folder: Path) -> bool:
    """Whether a folder lies on a file system of other machines."""
    try:
        mounts = [line.split()[1:3] for line in MOUNTS.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return False
    there = [(len(place), kind) for place, kind in mounts if folder.absolute().is_relative_to(place)]
    return bool(there) and REMOTE.search(max(there)[1]) is not None


def _number(file: Path) -> int:
    return int(file.parent.name.removeprefix("node"))


def _numbers(file: Path) -> set[int]:
    """`0-3,8` as numbers."""
    spans = [part.split("-") for part in file.read_text(encoding="ascii").strip().split(",") if part]
    return {number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)}
