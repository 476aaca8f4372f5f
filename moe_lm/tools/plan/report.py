"""A plan for a person, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_lm.config.model import ModelConfig
from moe_lm.config.run import RunConfig
from moe_lm.kernels.device import DTYPES
from moe_lm.parallel.topology import Topology
from moe_lm.tools.plan.devices import GIB, Device
from moe_lm.tools.plan.predict import mfu
from moe_lm.tools.plan.search import Estimate
from moe_lm.train.cost import cost
from moe_lm.train.preflight import checkpoint_bytes

SHOWN = 12  # layouts that fit, in the table
NEAR = 4  # and layouts that do not
MIB = 1 << 20
DAY = 24 * 3600
UNITS = {"days": DAY, "h": 3600, "min": 60, "s": 1}
TRUST = (
    "No GPU has run this program yet, and many of the achieved rates are assumptions: replace what you know better "
    "with --rate (docs/planning.md)."
)


@dataclass(frozen=True)
class Plan:
    """A run on so many devices: its own layout, and all others."""

    config: RunConfig  # with the data type of products resolved
    model: ModelConfig
    devices: int
    device: Device
    own: Estimate
    layouts: list[Estimate]  # those that fit first, the fastest first; none before the search
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

    def seconds(self, item: Estimate) -> float:
        """Of the whole run."""
        return self.tokens / self.speed(item)

    def days(self, item: Estimate) -> float:
        return self.seconds(item) / DAY

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


def show_own(plan: Plan, console: Console) -> None:
    """Print what the config takes as it is."""
    networks = f", {plan.device.between.name} between nodes of {plan.device.per_node}" if _crosses(plan) else ""
    console.print(f"{plan.devices} x {plan.device.name}{networks}; predicted, not measured\n", highlight=False)
    summary = Table.grid(padding=(0, 2))
    for name, text in _lines(plan, plan.own):
        summary.add_row(name, text)
    console.print(summary)


def show_layouts(plan: Plan, console: Console, command: str) -> None:
    """Print the table of layouts, and the `command` that starts the config with the settings of the fastest."""
    console.print(_table(plan))
    console.print(_legend(plan), highlight=False)
    if plan.best is not None:
        changes = plan.best.layout.changes(plan.config)
        fastest = f"The fastest: {command} {settings(changes)}" if changes else "The fastest is this config."
        console.print(f"\n{fastest}", highlight=False, soft_wrap=True)
    console.print(f"\nRates of {plan.device.name}: {plan.device.source}. {TRUST}", highlight=False)


def settings(values: Mapping[str, object]) -> str:
    """As one types them behind a command."""
    return " ".join(f"{key}={'null' if value is None else str(value).lower()}" for key, value in values.items())


def size(number: float) -> str:
    return f"{number / GIB:,.1f} GiB" if number >= GIB else f"{number / MIB:,.1f} MiB"


def duration(seconds: float) -> str:
    """In the unit of its size, to three digits."""
    for unit, in_seconds in (("days", 2 * DAY), ("h", 2 * 3600), ("min", 120), ("s", 1)):
        if seconds >= in_seconds:
            return f"{_three(seconds / UNITS[unit])} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _three(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


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
    price = "" if cost is None else f", cost {_price(cost)} at {plan.price:g} an hour and device"
    unit, in_bytes = ("GiB", GIB) if item.peak >= GIB else ("MiB", MIB)
    half, full = (plan.mfu(item, causal) for causal in (True, False))
    return [
        ("this config", str(item.layout)),
        *(
            [("", f"train.micro_batch_size={asked}, and a rank has {item.layout.rows} of the rows of a step")]
            if (asked := plan.config.train.micro_batch_size) not in (None, item.layout.rows)
            else []
        ),
        (
            "memory",
            f"{verdict}: {size(item.peak)} of {size(item.device.usable)} at the peak ({memory.peak_during})",
        ),
        ("", f"{', '.join(f'{name} {share / in_bytes:,.1f}' for name, share in shares.items())} {unit}"),
        ("step", f"{duration(item.seconds)}: {_percent(item.time.by_cause(), item.seconds)}"),
        ("", _percent(item.time.by_part(), item.seconds)),
        (
            "MFU",
            f"{half:.1%} with causal attention halved, {full:.1%} not, of {plan.device.peak / 1e12:,.3g} TFLOP/s",
        ),
        ("speed", f"{plan.speed(item):,.0f} tokens/s, {_number(plan.speed(item) * DAY)} a day"),
        ("the run", f"{_number(plan.tokens)} tokens in {duration(plan.seconds(item))}{price}"),
        ("a checkpoint", size(plan.checkpoint)),
    ]


def _table(plan: Plan) -> Table:
    fitting = [item for item in plan.layouts if item.fits][:SHOWN]
    others = [item for item in plan.layouts if not item.fits][:NEAR]
    more = len(plan.layouts) - len(fitting) - len(others)
    title = "\nLayouts, the fastest first, then the nearest that do not fit"
    title += f" ({more} more are in --json FILE)" if more else ""
    view = Table(title=title, title_justify="left", title_style="", show_edge=False, box=None, padding=(0, 1, 0, 0))
    for column in ("", "EP", "ZeRO", "rows", "recomputed", "GiB", "step", "MFU", "run", "bound by"):
        is_text = column in ("", "recomputed", "bound by")
        view.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    own = [plan.own] if plan.own.layout not in {item.layout for item in (*fitting, *others)} else []
    for item in (*fitting, *others, *own):
        layout = item.layout
        figures = (
            (duration(item.seconds), f"{plan.mfu(item, True):.1%}", duration(plan.seconds(item)))
            if item.fits
            else ("", "", "")
        )
        view.add_row(
            "*" if layout == plan.own.layout else "",
            str(layout.expert_parallel),
            f"{layout.zero or '-'}{' off' if layout.offload else ''}",
            str(layout.rows),
            layout.recompute,
            f"{item.peak / GIB:.1f}",
            *figures,
            _main_cause(item) if item.fits else "does not fit",
        )
    return view


def _legend(plan: Plan) -> str:
    zero = "ZeRO -: engine torch, nothing divided"
    if any(item.layout.offload for item in (plan.own, *plan.layouts)):
        zero += "; off: optimizer state in host memory"
    return (
        f"*: this config; EP: ranks that share a copy of the experts; {zero}; rows: sequences of a micro-batch; "
        "recomputed: train.activation_checkpointing; run: all of its steps"
    )


def _price(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.2f}"


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
