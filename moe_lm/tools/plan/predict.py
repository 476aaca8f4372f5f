"""The time of a step out of its trace: what bounds it, by cause and by part.

A kernel takes its products at the rate that the device reaches, its bytes at the bandwidth, and a fixed time of its
own. The host runs ahead of the device, so that launches count only where a pass has more of them than it has work.
Exchanges count as far as no work is queued to hide them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from moe_lm.config.model import ModelConfig
from moe_lm.model.size import flops_per_token
from moe_lm.tools.plan.devices import Device
from moe_lm.tools.plan.trace import PASSES, Collective, Part, Pass, Product, Trace, Work

Cause = Literal[
    "dense products", "grouped products", "attention", "other kernels", "launches", "host waits", "exchanges", "offload"
]
Name = TypeVar("Name")
CAUSES: tuple[Cause, ...] = Cause.__args__  # type: ignore[attr-defined]
CAUSE_OF: Mapping[str, Cause] = {
    "dense": "dense products",
    "grouped": "grouped products",
    "attention": "attention",
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by cause and part; their sum is the step's."""

    of: Mapping[tuple[Cause, Part], float]

    @property
    def seconds(self) -> float:
        return sum(self.of.values())

    def by_cause(self) -> dict[Cause, float]:
        """Seconds by cause, the longest first."""
        return _summed((cause, seconds) for (cause, _), seconds in self.of.items())

    def by_part(self) -> dict[Part, float]:
        """Seconds by part, the longest first."""
        return _summed((part, seconds) for (_, part), seconds in self.of.items())


def step_time(trace: Trace, device: Device) -> StepTime:
    """Predict the time of one step of the rank that was traced."""
    found: defaultdict[tuple[Cause, Part], float] = defaultdict(float)
    for during in PASSES:
        for cell, seconds in _pass_time(trace, during, device).items():
            found[cell] += trace.times(during) * seconds
    for sync in trace.syncs:
        found["host waits", sync.part] += sync.times * trace.times(sync.during) * device.sync
    idle: dict[Pass, float] = {}  # seconds of a pass beside which its links have nothing to send yet
    for collective in trace.collectives:
        seconds, hidden = exchange_seconds(collective, device), work_seconds(collective.hidden_by, device)
        if collective.part == "update":  # those of all groups are beside the same pass
            hidden = idle.get(collective.during, hidden)
            idle[collective.during] = max(0.0, hidden - seconds)
        found["exchanges", collective.part] += collective.times * max(0.0, seconds - hidden)
    return StepTime({cell: seconds for cell, seconds in found.items() if seconds > 0})


def _pass_time(trace: Trace, during: Pass, device: Device) -> dict[tuple[Cause, Part], float]:
    """Seconds of one such pass without exchanges."""
    found: Counter[tuple[Cause, Part]] = Counter()
    launches: Counter[Part] = Counter()
    for (when, part), work in trace.work.items():
        if when == during:
            launches[part] += work.launches
            for cause, seconds in _kernels(work, device):
                found[cause, part] += seconds  # type: ignore[assignment]
    busy, host = sum(found.values()), device.launch * launches.total()
    if host > busy:
        for part, count in launches.items():
            found["launches", part] += (host - busy) * count / launches.total()  # type: ignore[assignment]
    return dict(found)


def _kernels(work: Work, device: Device) -> Iterable[tuple[Cause, float]]:
    """The seconds of kernels on the device, by cause."""
    products = sum(product.count for product in work.products)
    for product in work.products:
        yield CAUSE_OF[product.kind], product.count * _product_seconds(product, device)
    yield "other kernels", work.bytes / device.copy + max(0, work.launches - products) * device.kernel


def _product_seconds(product: Product, device: Device) -> float:
    rate = {"dense": device.dense, "grouped": device.grouped, "attention": device.attention}[product.kind]
    if product.element_size >= 4:
        rate = min(rate, device.single)
    return max(product.flops / rate, product.bytes / device.copy) + device.kernel


def work_seconds(work: Work, device: Device) -> float:
    """The seconds of kernels on the device, however fast the host launches them."""
    return sum(seconds for _, seconds in _kernels(work, device))


def exchange_seconds(collective: Collective, device: Device) -> float:
    """The seconds of an exchange that nothing hides.

    Rings (sums, gathers) cross the network with all devices of a node at once; an exchange of rows only with its own.
    """
    ranks = len(collective.ranks)
    if ranks < 2:
        return 0.0
    nodes = Counter(rank // device.per_node for rank in collective.ranks)
    here = min(nodes.values())
    inside, between = device.inside, device.between
    if collective.kind == "all_to_all":
        near = collective.bytes * (here - 1) / ranks / inside.bandwidth
        far = collective.bytes * (ranks - here) / ranks / between.bandwidth
        return max(near, far) + (between if len(nodes) > 1 else inside).latency
    share = 1.0 if collective.kind in ("broadcast", "other") else (ranks - 1) / ranks
    sent = collective.bytes * share * (2 if collective.kind == "all_reduce" else 1)
    if len(nodes) == 1:
        return sent / inside.bandwidth + inside.latency
    return sent / min(inside.bandwidth, here * between.bandwidth) + between.latency


def offload_seconds(state: int, device: Device) -> dict[tuple[Cause, Part], float]:
    """The update in host memory of so many bytes of master weights and moments, 12 a parameter.

    Gradients go there and weights come back over the device's own link; the node's processors serve all its devices.
    """
    parameters = state / 12
    moved = parameters * (4 + 4) / device.host
    return {("offload", "update"): moved + parameters * device.per_node / device.host_update}


def mfu(model: ModelConfig, sequence_length: int, causal_half: bool, tokens: float, devices: int, peak: float) -> float:
    """Model FLOPs of `tokens` a second over the peak of all devices; either convention for causal attention."""
    return tokens * flops_per_token(model, sequence_length, causal_half) / (devices * peak)


def _summed(items: Iterable[tuple[Name, float]]) -> dict[Name, float]:
    totals: defaultdict[Name, float] = defaultdict(float)
    for name, seconds in items:
        totals[name] += seconds
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
