"""Checks before a run starts: a layout that divides, memory and a disk that suffice, and a folder that is free.

The start of a run, `--dry-run` and launch/slurm.sbatch's own check make the same ones, so that nothing which can be
known beforehand is found out after queueing.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from moe_lm.checkpoint.checkpoint import complete_checkpoints
from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import FinetuneConfig, RunConfig
from moe_lm.engine.build import check_batch_size
from moe_lm.kernels.device import pick_device
from moe_lm.parallel.topology import Topology
from moe_lm.train.alarms import Alarms
from moe_lm.train.cost import FLOAT32, Cost, all_settings, cost, describe, processes
from moe_lm.train.past import Plan

GIB = 1 << 30
MADE_BY_RUNS = ("config.yaml", "metrics.jsonl", "checkpoints")
HARMLESS = (".log", ".out", ".err", ".txt", ".yaml", ".yml", ".sh")  # what people put into a folder before a run
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
RANKS_HERE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, srun, mpirun


def check(config: RunConfig, model: ModelConfig, topology: Topology, fit: Fit | None = None) -> None:
    """Raise UsageError for what would end this run on this machine, at its start or at its first checkpoint.

    A rank that alone has too little says so, which is why only the layout is `common` to all ranks. On a GPU the main
    rank warns when `fit` predicts that a step needs more than there is: a prediction alone refuses no run.
    """
    check_layout(config, topology)
    check_folder(config.run_dir)
    refusals, warnings = lacking(config, model, topology)
    for sentence in refusals:
        raise UsageError(sentence)
    if fit is not None and topology.is_main and pick_device(config.parallel.device).type == "cuda":
        predicted = fit(config, model, topology).refusal
        warnings += [f"{predicted}; moe-lm plan has the layouts that fit"] if predicted else []
    for sentence in warnings if topology.is_main else ():
        print(f"warning: {sentence}", file=sys.stderr)


class Verdict(NamedTuple):
    """What a run needs of a device's memory, and why it is refused, if it is."""

    line: str
    refusal: str | None
    is_asked: bool  # the device was named, and need not be here
    dtype: torch.dtype  # of products on it


Fit = Callable[[RunConfig, ModelConfig, Topology], Verdict]  # of tools/plan, which the walk does not import


def dry_run(
    config: RunConfig,
    model: ModelConfig,
    topology: Topology,
    fit: Fit | None = None,
    data: Sequence[str] = (),
    settings: bool = False,
) -> str:
    """The text of `--dry-run`. Raises as `check` does, for as many processes as the layout needs at least.

    `data` are lines about the data. With `settings` all settings follow, and those of DeepSpeed.
    `fit` weighs all the memory of a step, in place of weights, gradients and optimizer alone. What only this machine
    lacks is a line of the text, not an error, where a run would not be: without a launcher, on a CPU that the config
    does not ask for. There a device that was asked for is another machine's, and this one's disk says nothing.
    """
    topology = replace(topology, world_size=processes(config, topology))
    check_layout(config, topology)
    check_folder(config.run_dir)
    verdict = None if fit is None else fit(config, model, topology)
    dtype = None if verdict is None else verdict.dtype
    refusals, warnings = lacking(config, model, topology, memory=verdict is None, dtype=dtype)
    if verdict is not None and verdict.refusal is not None:
        if verdict.is_asked:
            raise UsageError(verdict.refusal)
        refusals.insert(0, verdict.refusal)
    if verdict is not None and verdict.is_asked and not is_machine_of(config):
        refusals, warnings = [], []
    if refusals and is_machine_of(config):
        raise UsageError(refusals[0])
    alarms = Alarms(Plan(config.train, model, config.start_from is None, finetuning=isinstance(config, FinetuneConfig)))
    lines = [
        *describe(config, model, topology, verdict and verdict.line, dtype),
        *data,
        disk_line(config, cost(config, model, config.lora, topology, dtype)),
        *(f"not here        {sentence}" for sentence in (*refusals, *warnings)),
        *(f"alarm           {alarm.text}" for alarm in alarms.at_start() if config.log.alarms),
    ]
    return "\n".join([*lines, *(all_settings(config, topology) if settings else ())])


def lacking(
    config: RunConfig,
    model: ModelConfig,
    topology: Topology,
    memory: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[list[str], list[str]]:
    """What this machine has too little of, a sentence each: what refuses the run, and what it is only warned of.

    A run with a complete checkpoint is not refused for its disk: started again, it does as well as if it had gone on,
    and lets its older checkpoints give way.
    """
    needs = cost(config, model, config.lora, topology, dtype)
    warnings: list[str] = []
    refusals = [lacking_memory(config, needs, topology) if memory else None]
    if topology.is_main and (disk := lacking_disk(config, needs)):  # the others share it
        goes_on = bool(complete_checkpoints(config.run_dir / "checkpoints"))
        (warnings if goes_on else refusals).append(disk)
    if topology.is_main and (copies := lacking_copies(config, needs, topology)):
        warnings.append(copies)
    return [sentence for sentence in refusals if sentence], warnings


def check_layout(config: RunConfig, topology: Topology) -> None:
    """Raise UsageError when the processes cannot share the experts, rows, or the global batch."""
    parallel = config.parallel
    if parallel.engine == "deepspeed":
        topology.check_groups("parallel.expert_parallel_size", parallel.expert_parallel_size)
    topology.check_groups("parallel.sequence_parallel_size", parallel.sequence_parallel_size)
    topology = replace(topology, sequence_parallel_size=parallel.sequence_parallel_size)
    check_batch_size(config.train, topology)
    config.train.rows_at_once(topology.row_groups)
    for number, phase in enumerate(config.phases, 1):
        if phase.rows % topology.row_groups:
            raise UsageError(
                f"phase {number} of data.phases has {phase.rows} rows a step, which are not divisible by the "
                f"{topology.row_groups} processes or groups that have rows of their own; make train.global_batch_size "
                "larger",
                common=True,
            )


def check_folder(run_dir: Path) -> None:
    """Raise UsageError for a run folder that holds something else than a run, such as a model or a project."""
    try:
        entries = sorted(os.scandir(run_dir), key=lambda entry: entry.name)
    except OSError:
        return  # it is made, or refused with its reason, when the run claims it
    if any(entry.name in MADE_BY_RUNS for entry in entries):
        return
    strange = [entry.name for entry in entries if not _may_be_beside_a_run(entry)]
    if strange:
        raise UsageError(
            f"run_dir={run_dir} holds {', '.join(strange[:3])}{' and more' if len(strange) > 3 else ''}, which no run "
            "made; choose a new folder or an empty one"
        )


def _may_be_beside_a_run(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name == "logs":
        return True
    return entry.is_file() and Path(entry.name).suffix in ("", *HARMLESS)


def lacking_memory(config: RunConfig, needs: Cost, topology: Topology) -> str | None:
    """The sentence for weights, gradients and moments that the device cannot hold; None if it can."""
    device = pick_device(config.parallel.device)
    if device.type == "cuda":
        ranks, there = 1, torch.cuda.get_device_properties(device).total_memory
    else:
        ranks, there = ranks_here(topology), host_memory()
    wanted = ranks * needs.memory.total
    if wanted <= there:
        return None
    shared = f"{ranks} processes of this machine need" if ranks > 1 else "this run needs"
    return (
        f"{shared} {_size(wanted)} for weights, gradients and optimizer, and the memory of its {device.type} "
        f"is {_size(there)}; make the model smaller, or divide it over more devices (parallel.zero_stage, "
        "parallel.expert_parallel_size)"
    )


def lacking_copies(config: RunConfig, needs: Cost, topology: Topology) -> str | None:
    """The sentence for the copies of saves in the background that this host cannot hold; None if it can."""
    ranks, there = ranks_here(topology), host_memory()
    copies = checkpoint_bytes(config, needs) * ranks // topology.world_size
    in_use = 0 if pick_device(config.parallel.device).type == "cuda" else ranks * needs.memory.total
    if not config.checkpoint.background or in_use + copies <= there:
        return None
    return (
        f"saves in the background copy {_size(copies)} into the memory of this host, which has {_size(there - in_use)} "
        "for them; set checkpoint.background=false, and training waits for each save"
    )


def lacking_disk(config: RunConfig, needs: Cost) -> str | None:
    """The sentence for checkpoints that the disk of the run folder cannot hold; None if it can.

    A new checkpoint is written before an old one is deleted, and what the run has already saved makes room for it.
    """
    one = checkpoint_bytes(config, needs)
    kept = most_checkpoints(config)
    place = disk_of(config.run_dir)
    free = shutil.disk_usage(place).free
    if kept * one > free:
        files = (config.run_dir / "checkpoints").glob("step-*/**/*")
        free += sum(file.stat().st_size for file in files if file.is_file())
    if kept * one <= free:
        return None
    return (
        f"{kept} checkpoints of {_size(one)} need {_size(kept * one)}, and the disk of {place} has {_size(free)} for "
        f"them; free some space, lower checkpoint.keep={config.checkpoint.keep}, or choose another run_dir"
    )


def disk_line(config: RunConfig, needs: Cost) -> str:
    """The checkpoints that a run has at once, and the room for them."""
    one, kept = checkpoint_bytes(config, needs), most_checkpoints(config)
    free = shutil.disk_usage(disk_of(config.run_dir)).free
    return (
        f"disk            {kept} checkpoint{'s' * (kept > 1)} of {_size(one)} in {config.run_dir}, where "
        f"{_size(free)} are free"
    )


def disk_of(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return place


def checkpoint_bytes(config: RunConfig, needs: Cost) -> int:
    """The size of a checkpoint: weights in float32, only those of adapters if there are some, and the moments."""
    weights = needs.parameters if config.lora is None else needs.trained
    moments = needs.memory.optimizer if config.parallel.engine == "torch" else 2 * FLOAT32 * needs.trained
    return FLOAT32 * weights + moments


def most_checkpoints(config: RunConfig) -> int:
    """How many checkpoints the run has at once: those that are kept and the one being written, if it saves so many."""
    checkpoint, train = config.checkpoint, config.train
    archives = train.steps // checkpoint.archive_every if checkpoint.archive_every else 0
    saves = max(1, _times(checkpoint.every, train.steps))
    if not checkpoint.every or checkpoint.archive_every % checkpoint.every:
        saves += archives
    if checkpoint.best:
        saves += _times(train.eval_every, train.steps)
    return min(saves, checkpoint.keep + 1 + checkpoint.best + archives)


def _times(every: int, steps: int) -> int:
    """How often something is done every so many steps, and after the last one; 0 for never."""
    return -(-steps // every) if every else 0


def ranks_here(topology: Topology) -> int:
    """The ranks that this machine has, as the launcher says."""
    said = next((os.environ[name] for name in RANKS_HERE if name in os.environ), "1")
    return min(int(said) if said.isdecimal() else 1, topology.world_size)


def host_memory() -> int:
    """The memory of this machine in bytes, or of the container or the job in which this process runs."""
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_cgroup_limits())


def _cgroup_limits() -> Iterator[int]:
    """The limits in bytes of the cgroup of this process and of those around it, of either version of cgroups."""
    yield sys.maxsize
    with suppress(OSError, ValueError):  # none, or not Linux
        for line in OWN_CGROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root, name = CGROUPS, "memory.max"
            if controllers:
                root, name = CGROUPS / "memory", "memory.limit_in_bytes"
                if "memory" not in controllers.split(","):
                    continue
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if folder.is_relative_to(root):
                    with suppress(OSError, ValueError):  # no limit: no file, or "max"
                        yield int((folder / name).read_text(encoding="ascii"))


def is_machine_of(config: RunConfig) -> bool:
    """Whether a run with this config would be on this machine, as far as one can tell."""
    asked = config.parallel.device != "auto" or "SLURM_JOB_ID" in os.environ or "WORLD_SIZE" in os.environ
    return asked or pick_device("auto").type != "cpu"


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"
