"""`moe-lm plan`: does a run fit, what does a step take and what bounds it, when is it done, and which layout is best.

`--dry-run` asks the first of these for the layout of its config alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import RunConfig
from moe_lm.kernels.available import BY_SPEED
from moe_lm.kernels.device import DTYPES, pick_device, pick_dtype
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan.devices import GIB, OF_MEMORY, Device, changed, find_device, parsed
from moe_lm.tools.plan.measure import Shapes, measured
from moe_lm.tools.plan.predict import mfu
from moe_lm.tools.plan.search import Estimate, Tracer, estimate, nearest, search
from moe_lm.tools.plan.simulate import simulate
from moe_lm.tools.plan.trace import Trace
from moe_lm.train.cost import cost
from moe_lm.train.preflight import (
    Verdict,
    check_layout,
    checkpoint_bytes,
    host_memory,
    is_machine_of,
    ranks_here,
)

SHOWN = 12  # layouts that fit, in the table
NEAR = 4  # and layouts that do not
DAY = 24 * 3600


@dataclass(frozen=True)
class Plan:
    """A run on so many devices: its own layout, and all others."""

    config: RunConfig  # with the data type of products resolved
    model: ModelConfig
    devices: int
    device: Device
    own: Estimate
    layouts: list[Estimate]  # those that fit first, the fastest first
    tokens: float  # of the run
    price: float | None  # of a device in an hour

    @property
    def best(self) -> Estimate | None:
        return self.layouts[0] if self.layouts[0].fits else None

    @cached_property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint."""
        config, dtype = self.own.layout.applied(self.config), DTYPES[self.config.train.precision]
        needs = cost(config, self.model, config.lora, Topology(world_size=self.devices), dtype)
        return checkpoint_bytes(config, needs)

    def speed(self, item: Estimate) -> float:
        """Tokens a second."""
        return self.config.train.global_batch_size * self.config.row_length / item.seconds

    def days(self, item: Estimate) -> float:
        return self.tokens / self.speed(item) / DAY

    def cost(self, item: Estimate) -> float | None:
        return None if self.price is None else self.days(item) * 24 * self.devices * self.price

    def mfu(self, item: Estimate, causal_half: bool) -> float:
        length = self.config.data.sequence_length
        return mfu(self.model, length, causal_half, self.speed(item), self.devices, self.device.peak)

    def as_json(self) -> dict[str, Any]:
        return {
            "devices": self.devices,
            "device": asdict(self.device),
            "tokens": self.tokens,
            "checkpoint_bytes": self.checkpoint,
            "own": self._as_json(self.own),
            "layouts": [self._as_json(item) for item in self.layouts],
        }

    def _as_json(self, item: Estimate) -> dict[str, Any]:
        memory = item.trace.memory
        return {
            "layout": asdict(item.layout),
            "settings": item.layout.settings(),
            "fits": item.fits,
            "reason": None if item.fits else item.reason,
            "memory": asdict(memory),
            "usable_bytes": item.device.usable,
            "step_seconds": item.seconds,
            "seconds_by_cause": item.time.by_cause(),
            "seconds_by_part": item.time.by_part(),
            "mfu": {"causal attention halved": self.mfu(item, True), "not halved": self.mfu(item, False)},
            "tokens_a_second": self.speed(item),
            "tokens_a_day": self.speed(item) * DAY,
            "days": self.days(item),
            "cost": self.cost(item),
        }


def run(
    config: RunConfig,
    model: ModelConfig,
    devices: int | None,
    gpu: str | None,
    network: str | None,
    rates: Sequence[str],
    measure: bool,
    tokens: float | None,
    price: float | None,
    json_file: str | None,
) -> int:
    """Print the plan, and write it as JSON if asked; the exit code is 1 if no layout fits."""
    if json_file not in (None, "-"):
        _check_file(Path(json_file))
    plan = make(config, model, devices, gpu, network, rates, measure, tokens, price)
    text = json.dumps(plan.as_json(), indent=2) + "\n"
    if json_file == "-":
        sys.stdout.write(text)
    else:
        show(plan, Console())
        if json_file is not None:
            Path(json_file).write_text(text, encoding="utf-8")
    return 0 if plan.best is not None else 1


def _check_file(path: Path) -> None:
    """Raise UsageError for a file that cannot be written, before hours are spent on what it is to hold."""
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UsageError(
            f"--json {path} cannot be written ({error.strerror}); give another file, or - for stdout"
        ) from error


def make(
    config: RunConfig,
    model: ModelConfig,
    devices: int | None = None,
    gpu: str | None = None,
    network: str | None = None,
    rates: Sequence[str] = (),
    measure: bool = False,
    tokens: float | None = None,
    price: float | None = None,
) -> Plan:
    """Plan a run, on `gpu` or else the h100s of the table.

    Raises UsageError for an unknown device, and for devices that the run cannot be divided over.
    """
    if measure and gpu not in (None, "cpu"):
        raise UsageError(
            f"--measure measures this machine, and --gpu {gpu} names another one; leave out one of them, or give the "
            "rates that you know by hand: --rate dense=600e12"
        )
    if config.lora is not None or config.preference is not None:
        raise UsageError(
            "adapters (lora) and preferences are not planned; --dry-run of moe-lm finetune says what their weights, "
            "gradients and moments need"
        )
    devices = devices or config.parallel.expert_parallel_size
    check_layout(config, Topology(world_size=devices))
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
    return Plan(config, model, devices, on, own, search(config, model, devices, on, tracer), tokens or whole, price)


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
    tokens = config.train.rows_at_once(devices) * config.row_length
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

    def traced(config: RunConfig, devices: int) -> Trace:
        key = f"{devices} {config.parallel!r} {config.train!r}"
        if key not in known:
            known[key] = simulate(model, config.train, config.parallel, config.row_length, devices, device=kind)
        return known[key]

    return traced


def fit(config: RunConfig, model: ModelConfig, topology: Topology, gpu: str | None = None) -> Verdict:
    """Whether the layout of a config fits a device, for `--dry-run`; without `gpu` the one that a run has here.

    If it does not, the verdict names the nearest layout that does.
    """
    devices = topology.world_size
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
    room = f"{_size(device.usable)} ({OF_MEMORY:.0%} of the memory of {device.name})"
    needs = f"{_size(own.peak)} at the peak on each device of {devices}"
    if own.fits:
        return Verdict(f"{needs}, of {room}: fits", None, is_asked, dtype)
    said = f"this run needs {needs} ({own.trace.memory.peak_during}), and there are {room}"
    if is_asked or is_machine_of(config):
        other = nearest(own.layout, search(config, model, devices, device, tracer))
        if other is None:
            said += "; no layout of as many devices fits; take more of them, or larger ones"
        else:
            settings = _settings(other.layout.changes(own.layout))
            said += f"; the nearest layout that fits needs {_size(other.peak)}: {settings}"
    return Verdict(f"{needs}, of {room}", said, is_asked, dtype)


def _device_to_fill(config: RunConfig, topology: Topology, gpu: str | None) -> tuple[Device, torch.device | None]:
    """The device whose memory a run is to fit, and which one of this machine it is; None for another's GPU."""
    if gpu is not None and gpu != "cpu":
        return find_device(gpu), None
    here = torch.device("cpu") if gpu == "cpu" else pick_device(config.parallel.device)
    memory = memory_here(here, ranks_here(topology))
    return replace(find_device("h100"), name=f"this {here.type}", memory=memory), here


def show(plan: Plan, console: Console) -> None:
    """Print the plan for a person."""
    networks = f", {plan.device.between.name} between nodes of {plan.device.per_node}" if _crosses(plan) else ""
    console.print(f"{plan.devices} x {plan.device.name}{networks}; predicted, not measured\n", highlight=False)
    summary = Table.grid(padding=(0, 2))
    for name, text in _lines(plan, plan.own):
        summary.add_row(name, text)
    console.print(summary)
    console.print(_table(plan))
    if plan.best is not None:
        console.print(f"The fastest: {_settings(plan.best.layout.settings())}", highlight=False, soft_wrap=True)
    console.print(f"Rates of {plan.device.name}: {plan.device.source}.", highlight=False, soft_wrap=True)


def _lines(plan: Plan, item: Estimate) -> list[tuple[str, str]]:
    memory = item.trace.memory
    shares = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "ZeRO's buffers": memory.zero,
        "communication": memory.communication,
        "activations": memory.activations,
    }
    verdict = "fits" if item.fits else "does not fit"
    cost = plan.cost(item)
    price = "" if cost is None else f", {cost:,.0f} at {plan.price:g} an hour and device"
    half, full = (plan.mfu(item, causal) for causal in (True, False))
    return [
        ("this config", str(item.layout)),
        (
            "memory",
            f"{verdict}: {_size(item.peak)} of {_size(item.device.usable)} at the peak ({memory.peak_during})",
        ),
        ("", ", ".join(f"{name} {size / GIB:.1f}" for name, size in shares.items())),
        ("step", f"{item.seconds:.3g} s, {_percent(item.time.by_cause(), item.seconds)}"),
        ("", _percent(item.time.by_part(), item.seconds)),
        (
            "MFU",
            f"{half:.1%} with causal attention halved, {full:.1%} not, of {plan.device.peak / 1e12:,.3g} TFLOP/s",
        ),
        ("speed", f"{plan.speed(item):,.0f} tokens/s, {_number(plan.speed(item) * DAY)} a day"),
        ("the run", f"{_number(plan.tokens)} tokens in {plan.days(item):,.3g} days{price}"),
        ("a checkpoint", f"{plan.checkpoint / GIB:,.2f} GiB"),
    ]


def _table(plan: Plan) -> Table:
    view = Table(caption="layouts, the fastest first, then the nearest that do not fit", show_edge=False, box=None)
    for column in ("EP", "ZeRO", "rows", "recomputed", "GiB", "step", "MFU", "days", ""):
        view.add_column(column, justify="left" if column in ("recomputed", "") else "right", no_wrap=True)
    fitting = [item for item in plan.layouts if item.fits][:SHOWN]
    others = [item for item in plan.layouts if not item.fits][:NEAR]
    for item in (*fitting, *others):
        layout = item.layout
        figures = (
            (f"{item.seconds:.3g} s", f"{plan.mfu(item, True):.1%}", f"{plan.days(item):,.3g}")
            if item.fits
            else ("", "", "")
        )
        view.add_row(
            str(layout.expert_parallel),
            f"{layout.zero or '-'}{' off' if layout.offload else ''}",
            str(layout.rows),
            layout.recompute,
            f"{item.peak / GIB:.1f}",
            *figures,
            _main_cause(item) if item.fits else item.reason,
        )
    return view


def _settings(settings: Mapping[str, object]) -> str:
    """As one types them behind a command."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def _main_cause(item: Estimate) -> str:
    cause, seconds = next(iter(item.time.by_cause().items()))
    return f"{cause} {seconds / item.seconds:.0%}"


def _crosses(plan: Plan) -> bool:
    return plan.devices > plan.device.per_node


def _percent(seconds: Mapping[Any, float], whole: float) -> str:
    return ", ".join(f"{name} {share / whole:.0%}" for name, share in seconds.items() if share >= 0.005 * whole)


def _number(value: float) -> str:
    """A count in the words of the field: 2.1T, 104B, 3.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"
