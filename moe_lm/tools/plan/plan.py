"""`moe-lm plan`: does a run fit, what does a step take and what bounds it, when is it done, and which layout is best.

`--dry-run` asks the first of these for the layout of its config alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from rich.console import Console

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import RunConfig
from moe_lm.kernels.available import BY_SPEED
from moe_lm.kernels.device import DTYPES, pick_device, pick_dtype
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan.devices import OF_MEMORY, Device, changed, find_device, parsed
from moe_lm.tools.plan.measure import Shapes, measured
from moe_lm.tools.plan.report import Plan, settings, show_layouts, show_own, size
from moe_lm.tools.plan.search import Layout, Tracer, estimate, nearest, search, with_own
from moe_lm.tools.plan.simulate import Recorded, simulate
from moe_lm.tools.plan.trace import Trace
from moe_lm.train.preflight import Verdict, check_layout, host_memory, is_machine_of, ranks_here


def run(
    config: RunConfig,
    model: ModelConfig,
    command: str,
    devices: int | None,
    gpu: str | None,
    network: str | None,
    rates: Sequence[str],
    measure: bool,
    tokens: float | None,
    price: float | None,
    json_file: str | None,
) -> int:
    """Print the plan, and write it as JSON if asked; the exit code is 1 if no layout fits.

    `command` starts the config, and can have other settings behind it.
    """
    if json_file not in (None, "-"):
        _check_file(Path(json_file))
    with Console(stderr=True).status("simulating this config") as status:  # shows on a terminal only
        plan, tracer = begin(config, model, devices, gpu, network, rates, measure, tokens, price)
        if json_file != "-":
            show_own(plan, Console())
        plan = searched(plan, _told(tracer, status.update))
    text = json.dumps(plan.as_json(), indent=2) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
    else:
        show_layouts(plan, Console(), command)
        if json_file is not None:
            Path(json_file).write_text(text, encoding="utf-8")
    return 0 if plan.best is not None else 1


def check_planned(config: RunConfig) -> None:
    """Raise UsageError for a run that the simulated rank does not know."""
    if config.lora is not None or config.preference is not None:
        raise UsageError(
            "adapters (lora) and preferences are not planned; --dry-run of moe-lm finetune says what their weights, "
            "gradients and moments need"
        )


def _check_file(path: Path) -> None:
    """Raise UsageError for a file that cannot be written, before hours are spent on what it is to hold."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(
            f"--json {path} cannot be written ({error.strerror}); give another file, or - for stdout"
        ) from error


def begin(
    config: RunConfig,
    model: ModelConfig,
    devices: int | None,
    gpu: str | None,
    network: str | None,
    rates: Sequence[str],
    measure: bool,
    tokens: float | None,
    price: float | None,
) -> tuple[Plan, Tracer]:
    """Plan a run in its own layout, on `gpu` or else the h100s of the table, for a search to go on with.

    Raises UsageError for an unknown device, and for devices that the run cannot be divided over.
    """
    if measure and gpu not in (None, "cpu"):
        raise UsageError(
            f"--measure measures this machine, and --gpu {gpu} names another one; leave out one of them, or give the "
            "rates that you know by hand: --rate dense=600e12"
        )
    devices = devices or config.parallel.least_processes
    check_layout(config, Topology(world_size=devices))
    config = config.in_longest_phase
    here = None
    if gpu == "cpu" or measure:
        here = torch.device("cuda" if gpu is None and torch.cuda.is_available() else "cpu")
    config = resolved(config, here)
    on = (
        find_device(gpu or "h100", rates, network)
        if here is None
        else device_here(config, model, devices, here, network, rates)
    )
    tracer = tracer_of(model, "cuda" if here is None else here.type)
    own = estimate(config, devices, on, tracer)
    whole = config.train.steps * config.train.global_batch_size * config.row_length
    return Plan(config, model, devices, on, own, [], tokens or whole, price), tracer


def searched(plan: Plan, tracer: Tracer) -> Plan:
    """The plan with all layouts."""
    config, devices, on = plan.config, plan.devices, plan.device
    found = search(config, plan.model, devices, on, tracer)
    exact = with_own(plan.own, found, lambda layout: estimate(layout.applied(config), devices, on, tracer))
    return replace(plan, layouts=exact)


def _told(tracer: Tracer, tell: Callable[[str], None]) -> Tracer:
    """The tracer, telling how many it has simulated."""
    numbers = count(1)

    def traced(config: RunConfig, devices: int) -> Trace:
        tell(f"simulating layout {next(numbers)}: {Layout.of(config, devices)}")
        return tracer(config, devices)

    return traced


def resolved(config: RunConfig, here: torch.device | None) -> RunConfig:
    """The config with the data type of products that `auto` is on a device; None is a GPU that is not here."""
    if config.train.precision != "auto":
        return config
    dtype = "bfloat16" if here is None else str(pick_dtype("auto", here)).removeprefix("torch.")
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": dtype})})


def device_here(
    config: RunConfig,
    model: ModelConfig,
    devices: int,
    here: torch.device,
    network: str | None,
    rates: Sequence[str],
) -> Device:
    """A device of this machine with the rates that it reaches now, but for those that were given by hand."""
    dtype = DTYPES[config.train.precision]
    parallel = config.parallel
    rows = config.train.rows_at_once(parallel.row_groups(devices))
    tokens = rows * config.row_length // parallel.sequence_parallel_size
    found = measured(
        Shapes.of(model, tokens, config.data.sequence_length, dtype, here), devices, memory_here(here, devices)
    )
    return changed(found, parsed(rates), network)


def memory_here(device: torch.device, ranks: int) -> int:
    """Bytes that a rank of so many on this machine can have."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory() // ranks


def tracer_of(model: ModelConfig, kind: str) -> Tracer:
    """Simulate a rank of a config with this model and the kernels of a kind of device; each layout once."""
    known: dict[str, Trace] = {}
    recorded: dict[str, Recorded] = {}

    def traced(config: RunConfig, devices: int) -> Trace:
        key = f"{devices} {config.parallel!r} {config.train!r}"
        if key not in known:
            known[key] = simulate(
                model, config.train, config.parallel, config.row_length, devices, device=kind, known=recorded
            )
        return known[key]

    return traced


def fit(
    config: RunConfig, model: ModelConfig, topology: Topology, gpu: str | None = None, searches: bool = True
) -> Verdict:
    """Whether the layout of a config fits a device, for `--dry-run`; without `gpu` the one that a run has here.

    If it does not, the verdict names the nearest layout that does, unless told not to search for it.
    """
    devices, config = topology.world_size, config.in_longest_phase
    device, here = _device_to_fill(config, topology, gpu)
    kind = "cuda" if here is None or here.type == "cuda" else "cpu"
    is_asked = gpu is not None
    config = resolved(config, here)
    dtype = DTYPES[config.train.precision]
    if not is_asked and not is_machine_of(config) and config.parallel.attention_kernel not in BY_SPEED[kind]:
        # A kernel of the machine that the run will have, such as a GPU's on a login node.
        parallel = config.parallel.model_copy(update={"attention_kernel": "auto"})
        config = config.model_copy(update={"parallel": parallel})
    tracer = tracer_of(model, kind)
    own = estimate(config, devices, device, tracer)
    room = f"{size(device.usable)} ({OF_MEMORY:.0%} of the memory of {device.name})"
    needs = f"{size(own.peak)} at the peak on each device of {devices}"
    if own.fits:
        return Verdict(f"{needs}, of {room}: fits", None, is_asked, dtype)
    said = f"this run needs {needs} ({own.trace.memory.peak_during}), and there are {room}"
    if searches and (is_asked or is_machine_of(config)):
        other = nearest(config, search(config, model, devices, device, tracer))
        if other is None:
            said += (
                "; no layout of as many devices fits; take more of them, or larger ones, as in "
                f"moe-lm plan CONFIG --gpus {2 * devices} --gpu {gpu or 'h100'}"
            )
        else:
            changes = settings(other.layout.changes(config))
            said += f"; the nearest layout that fits needs {size(other.peak)}: {changes}"
    else:
        said += "; name the device of the run with --gpu"
    return Verdict(needs, said, is_asked, dtype)


def _device_to_fill(config: RunConfig, topology: Topology, gpu: str | None) -> tuple[Device, torch.device | None]:
    """The device whose memory a run is to fit, and which one of this machine it is; None for another's GPU."""
    if gpu is not None and gpu != "cpu":
        return find_device(gpu), None
    here = torch.device("cpu") if gpu == "cpu" else pick_device(config.parallel.device)
    memory = memory_here(here, ranks_here(topology))
    return replace(find_device("h100"), name=f"this {here.type}", memory=memory), here
