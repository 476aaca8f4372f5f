"""Checks before a run starts: a layout that divides, memory and a disk that suffice, and a folder that is free.

The start of a run, `--dry-run` and launch/slurm.sbatch's own check make the same ones, so that nothing which can be
known beforehand is found out after queueing.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import RunConfig
from moe_lm.engine.build import check_batch_size
from moe_lm.kernels.device import pick_device
from moe_lm.parallel.expert_parallel import check_groups
from moe_lm.parallel.topology import Topology
from moe_lm.train.cost import FLOAT32, Cost, cost, describe, processes

GIB = 1 << 30
MADE_BY_RUNS = ("config.yaml", "metrics.jsonl", "checkpoints")
HARMLESS = (".log", ".out", ".err", ".txt", ".yaml", ".yml", ".sh")  # what people put into a folder before a run
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check(config: RunConfig, model: ModelConfig, topology: Topology) -> None:
    """Raise UsageError for what would end this run on this machine, at its start or at its first checkpoint."""
    check_layout(config, topology)
    check_folder(config.run_dir)
    for sentence in lacking(config, model, topology):
        raise UsageError(sentence, common=True)


def dry_run(config: RunConfig, model: ModelConfig, topology: Topology) -> str:
    """The text of `--dry-run`. Raises as `check` does, for as many processes as the layout needs at least.

    What only this machine lacks is a line of the text, not an error, where a run would not be: without a launcher, on a
    CPU that the config does not ask for.
    """
    topology = replace(topology, world_size=processes(config, topology))
    check_layout(config, topology)
    check_folder(config.run_dir)
    text = describe(config, model, topology)
    sentences = lacking(config, model, topology)
    if sentences and _is_machine_of(config):
        raise UsageError(sentences[0], common=True)
    return "\n".join([text, *(f"not here        {sentence}" for sentence in sentences)])


def lacking(config: RunConfig, model: ModelConfig, topology: Topology) -> list[str]:
    """A sentence for the memory and one for the disk, where this machine has too little."""
    needs = cost(config, model, config.lora, topology)
    return [sentence for sentence in (lacking_memory(config, needs), lacking_disk(config, needs)) if sentence]


def check_layout(config: RunConfig, topology: Topology) -> None:
    """Raise UsageError when the processes cannot share the experts or the global batch."""
    if config.parallel.engine == "deepspeed":
        check_groups(config.parallel.expert_parallel_size, topology)
    check_batch_size(config.train, topology)
    config.train.rows_at_once(topology.world_size)


def check_folder(run_dir: Path) -> None:
    """Raise UsageError for a run folder that holds something else than a run, such as a model or a project."""
    try:
        names = sorted(entry.name for entry in os.scandir(run_dir))
    except OSError:
        return  # it is made, or refused with its reason, when the run claims it
    if any(name in MADE_BY_RUNS for name in names):
        return
    strange = [name for name in names if not name.startswith(".") and name != "logs" and not name.endswith(HARMLESS)]
    if strange:
        raise UsageError(
            f"run_dir={run_dir} holds {', '.join(strange[:3])}{' and more' if len(strange) > 3 else ''}, which no run "
            "made; choose a new folder or an empty one",
            common=True,
        )


def lacking_memory(config: RunConfig, needs: Cost) -> str | None:
    """The sentence for weights, gradients and moments that the device cannot hold; None if it can."""
    device = pick_device(config.parallel.device)
    if device.type == "cuda":
        ranks, there = 1, torch.cuda.get_device_properties(device).total_memory
    else:
        ranks, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), host_memory()
    wanted = ranks * needs.memory.total
    if wanted <= there:
        return None
    shared = f"{ranks} processes of this machine need" if ranks > 1 else "this run needs"
    return (
        f"{shared} {_size(wanted)} for weights, gradients and optimizer, and the memory of its {device.type} "
        f"is {_size(there)}; make the model smaller, or divide it over more devices (parallel.zero_stage, "
        "parallel.expert_parallel_size)"
    )


def lacking_disk(config: RunConfig, needs: Cost) -> str | None:
    """The sentence for checkpoints that the disk of the run folder cannot hold; None if it can.

    A new checkpoint is written before an old one is deleted, and what the run has already saved makes room for it.
    """
    one = checkpoint_bytes(config, needs)
    kept = config.checkpoint.keep + 1 if config.checkpoint.every else 1
    place = config.run_dir.absolute()
    while not place.is_dir():
        place = place.parent
    saved = sum(file.stat().st_size for file in (config.run_dir / "checkpoints").glob("step-*/**/*") if file.is_file())
    free = shutil.disk_usage(place).free + saved
    if kept * one <= free:
        return None
    return (
        f"{kept} checkpoints of {_size(one)} need {_size(kept * one)}, and the disk of {place} has {_size(free)} for "
        f"them; free some space, lower checkpoint.keep={config.checkpoint.keep}, or choose another run_dir"
    )


def checkpoint_bytes(config: RunConfig, needs: Cost) -> int:
    """The size of a checkpoint: weights in float32, only those of adapters if there are some, and the moments."""
    weights = needs.parameters if config.lora is None else needs.trained
    moments = needs.memory.optimizer if config.parallel.engine == "torch" else 2 * FLOAT32 * needs.trained
    return FLOAT32 * weights + moments


def host_memory() -> int:
    """The memory of this machine in bytes, or of the container in which this process runs."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(there, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return there


def _is_machine_of(config: RunConfig) -> bool:
    """Whether a run with this config would be on this machine, as far as one can tell."""
    asked = config.parallel.device != "auto" or "SLURM_JOB_ID" in os.environ or "WORLD_SIZE" in os.environ
    return asked or pick_device("auto").type != "cpu"


def _size(number: int) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / 2**20:,.1f} MiB"
