"""The layouts of a number of devices: those that divide, which of them fit, and the fastest first.

Few are traced: one micro-batch of the smallest size and one of the next, for each way to divide the experts and to
recompute. What a larger micro-batch takes lies on the line through the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig, RunConfig
from moe_lm.config.training import Recomputation, TrainConfig
from moe_lm.tools.plan.devices import GIB, Device
from moe_lm.tools.plan.predict import StepTime, offload_seconds, step_time
from moe_lm.tools.plan.trace import Collective, Memory, Product, Trace, Work

RECOMPUTE: tuple[Recomputation, ...] = ("full", "selective", "none")  # the least memory first
KEPT = {"device", "attention_kernel", "timeout_seconds", "sequence_parallel_size"}  # as the config has it
MOST_ROWS = 32  # of a micro-batch: more fill no device better

Tracer = Callable[[RunConfig, int], Trace]  # of a config on so many devices


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over its devices. `zero` 0 is the engine without DeepSpeed: everything whole everywhere."""

    devices: int
    expert_parallel: int
    zero: int
    rows: int  # of a micro-batch
    recompute: Recomputation
    offload: bool = False

    @classmethod
    def of(cls, config: RunConfig, devices: int) -> Layout:
        """The layout that a config asks for."""
        parallel, train = config.parallel, config.train
        zero = 0 if parallel.engine == "torch" else parallel.zero_stage or 1
        recompute = train.activation_checkpointing
        rows = train.rows_at_once(parallel.row_groups(devices))
        return cls(devices, parallel.expert_parallel_size, zero, rows, recompute, parallel.offload_optimizer)

    def settings(self) -> dict[str, object]:
        """The settings that ask for this layout."""
        settings: dict[str, object] = {
            "train.micro_batch_size": self.rows,
            "train.activation_checkpointing": self.recompute,
            "parallel.engine": "deepspeed" if self.zero else "torch",
        }
        if self.zero:
            settings |= {"parallel.expert_parallel_size": self.expert_parallel, "parallel.zero_stage": self.zero}
        if self.offload:
            settings["parallel.offload_optimizer"] = True
        if self.zero == 3:
            settings["train.compile"] = False  # which ZeRO 3 refuses
        return settings

    def changes(self, config: RunConfig) -> dict[str, object]:
        """The settings to change in a config for this layout, those to take back included."""
        changed: dict[str, object] = {}
        for section in ("parallel", "train"):
            ours, theirs = (
                getattr(layout.applied(config), section).model_dump()
                for layout in (self, Layout.of(config, self.devices))
            )
            changed |= {f"{section}.{key}": value for key, value in ours.items() if value != theirs[key]}
        return changed

    def applied(self, config: RunConfig) -> RunConfig:
        """The config in this layout."""
        changes: dict[str, dict[str, object]] = {"parallel": {}, "train": {}}
        for key, value in self.settings().items():
            section, name = key.split(".")
            changes[section][name] = value
        plain = config.parallel.model_dump(include=KEPT)
        parallel = ParallelConfig.model_validate({**plain, **changes["parallel"]})
        train = TrainConfig.model_validate(config.train.model_dump() | changes["train"])
        return config.model_copy(update={"parallel": parallel, "train": train})

    def __str__(self) -> str:
        zero = f"ZeRO {self.zero}" if self.zero else "data parallel" if self.devices > 1 else "one device"
        experts = f"expert parallel {self.expert_parallel}, " if self.expert_parallel > 1 else ""
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} a micro-batch"
        offload = ", offload" if self.offload else ""
        return f"{experts}{zero}, {rows}, recomputation {self.recompute}{offload}"


@dataclass(frozen=True)
class Estimate:
    """What a layout takes."""

    layout: Layout
    trace: Trace
    time: StepTime
    device: Device

    @property
    def peak(self) -> int:
        return self.trace.memory.peak

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.usable

    @property
    def seconds(self) -> float:
        return self.time.seconds

    @property
    def reason(self) -> str:
        """Why it does not fit."""
        return f"needs {self.peak / GIB:,.1f} GiB of {self.device.usable / GIB:,.1f}"


def estimate(config: RunConfig, devices: int, device: Device, trace: Tracer) -> Estimate:
    """What the config takes as it is. Raises UsageError if its processes cannot be divided so."""
    layout = Layout.of(config, devices)
    kept = config.parallel.model_copy(update={"offload_optimizer": False})
    return _estimate(layout, trace(config.model_copy(update={"parallel": kept}), devices), device)


def _estimate(layout: Layout, trace: Trace, device: Device) -> Estimate:
    """Of a trace without offload, which is arithmetic."""
    if not layout.offload:
        return Estimate(layout, trace, step_time(trace, device), device)
    state = trace.memory.optimizer
    memory = replace(trace.memory, optimizer=0, peak=trace.memory.peak - state)
    # Of the update only Muon's products are left on the device.
    work = {
        cell: Work(found.products, launches=len(found.products)) if cell[0] == "update" else found
        for cell, found in trace.work.items()
    }
    moved = replace(trace, memory=memory, work=work)
    time = step_time(moved, device)
    return Estimate(layout, moved, replace(time, of={**time.of, **offload_seconds(state, device)}), device)


def search(config: RunConfig, model: ModelConfig, devices: int, device: Device, trace: Tracer) -> list[Estimate]:
    """The layouts that divide: those that fit, the fastest first, then others, the nearest to fitting first.

    Left out is what can be no better: a higher stage of ZeRO where a lower one fits in every way, and less
    recomputation where more does not fit. Optimizer state lies in host memory only where nothing fits otherwise. Raises
    UsageError when the batch does not divide.
    """
    check_batch(config, devices)
    found: list[Estimate] = []
    for offload in (False, True):
        for stages in _ways(config, model, devices, device.per_node, offload):
            for group in stages:
                tried = list(_recomputations(config, group, device, trace))
                found += tried
                if all(item.fits for item in tried):
                    break
        if any(item.fits for item in found):
            break
    return _ranked(found)


def with_own(own: Estimate, found: list[Estimate], exact: Callable[[Layout], Estimate]) -> list[Estimate]:
    """The layouts in the same order, with the config's own in its place and the fastest not taken from a line."""
    known = {item.layout: item for item in found} | {own.layout: own}
    exactly = {own.layout}
    while (first := (ranked := _ranked(known.values()))[0]).fits and first.layout not in exactly:
        exactly.add(first.layout)
        known[first.layout] = exact(first.layout)
    return ranked


def nearest(config: RunConfig, found: Sequence[Estimate]) -> Estimate | None:
    """Of the layouts that fit the one with the fewest changes to a config, then the fastest; None if none fits."""
    fitting = [item for item in found if item.fits]
    return min(fitting, key=lambda item: (len(item.layout.changes(config)), item.seconds), default=None)


def _ranked(found: Iterable[Estimate]) -> list[Estimate]:
    return sorted(found, key=lambda item: (not item.fits, item.seconds if item.fits else item.peak))


def _ways(
    config: RunConfig, model: ModelConfig, devices: int, per_node: int, offload: bool
) -> Iterator[Sequence[Layout]]:
    """Every way to divide the experts, each with the stages of ZeRO that may go with it, the lowest first."""
    if not offload:
        yield (Layout(devices, 1, 0, 1, "full"),)
    if devices > 1:
        own = config.parallel.expert_parallel_size
        for size in sorted({own, *expert_parallel_sizes(model, devices, per_node)}):
            yield [Layout(devices, size, stage, 1, "full", offload) for stage in (1, 2, 3)]


def _recomputations(config: RunConfig, group: Layout, device: Device, trace: Tracer) -> Iterator[Estimate]:
    for recompute in RECOMPUTE:
        tried = list(_micro_batches(config, replace(group, recompute=recompute), device, trace))
        yield from tried
        if not tried[0].fits:
            return


def _micro_batches(config: RunConfig, group: Layout, device: Device, trace: Tracer) -> Iterator[Estimate]:
    """The layouts that differ from `group` in their micro-batches alone."""
    devices = group.devices
    share = config.train.global_batch_size // config.parallel.row_groups(devices)
    rows = [count for count in range(1, min(share, MOST_ROWS) + 1) if share % count == 0]

    def traced(count: int) -> Trace:
        return trace(replace(group, rows=count, offload=False).applied(config), devices)

    smallest = traced(1)
    first = _estimate(group, smallest, device)
    yield first
    if first.fits and len(rows) > 1:  # larger ones need more
        second = traced(rows[1])
        for count in rows[1:]:
            alone = count == share  # which accumulates nothing
            on_line = not alone and _is_alike(smallest, second)
            made = between(smallest, second, count * smallest.tokens) if on_line else traced(count)
            yield _estimate(replace(group, rows=count), made, device)


def _is_alike(small: Trace, large: Trace) -> bool:
    """Whether two traces have the same exchanges, one by one, so that a line can be drawn through them."""
    kinds = [[(c.kind, c.ranks, c.part, c.during) for c in trace.collectives] for trace in (small, large)]
    return kinds[0] == kinds[1]


def check_batch(config: RunConfig, devices: int) -> None:
    """Raise UsageError when the devices cannot share the global batch evenly."""
    groups = config.parallel.row_groups(devices)
    if config.train.global_batch_size % groups:
        named = "devices" if groups == devices else "groups of devices that share rows"
        raise UsageError(
            f"train.global_batch_size={config.train.global_batch_size} is not divisible by the {groups} {named}; "
            f"choose a multiple of {groups}, or another --gpus"
        )


def expert_parallel_sizes(model: ModelConfig, devices: int, per_node: int) -> list[int]:
    """Numbers of ranks to share a copy of the experts: 1, the most in a node, the fewest and the most across nodes."""
    experts = model.n_routed_experts or 1
    sizes = [size for size in range(2, min(experts, devices) + 1) if experts % size == 0 and devices % size == 0]
    within, across = ([size for size in sizes if (size <= per_node) is inside] for inside in (True, False))
    return [1, *within[-1:], *sorted({*across[:1], *across[-1:]})]


def between(small: Trace, large: Trace, tokens: int) -> Trace:
    """The trace of a micro-batch of `tokens`, on the line through two others of the same layout."""
    along = (tokens - small.tokens) / (large.tokens - small.tokens)
    micro_batches = small.micro_batches * small.tokens // tokens

    def line(first: float, second: float) -> int:
        return max(0, round(first + along * (second - first)))

    def times(first: int, second: int) -> int:
        """Of an exchange in a step: some come in every micro-batch, some once."""
        each = (first - second) / (small.micro_batches - large.micro_batches)
        return round(first + each * (micro_batches - small.micro_batches))

    def product(first: Product, second: Product) -> Product:
        names = ("rows", "flops", "bytes", "count")
        on_it = {name: line(getattr(first, name), getattr(second, name)) for name in names}
        return replace(first, **on_it)  # type: ignore[arg-type]

    def work(first: Work, second: Work) -> Work:
        if len(first.products) == len(second.products):
            products = tuple(map(product, first.products, second.products))
        else:  # such as a loss in more chunks
            share = tokens / large.tokens
            products = tuple(replace(p, count=max(1, round(p.count * share))) for p in second.products)
        launches = line(first.launches, second.launches)
        return Work(products, line(first.bytes, second.bytes), launches)

    def exchange(first: Collective, second: Collective) -> Collective:
        return replace(
            first,
            bytes=line(first.bytes, second.bytes),
            times=times(first.times, second.times),
            hidden_by=work(first.hidden_by, second.hidden_by),
        )

    def memory(first: Memory, second: Memory) -> Memory:
        saved = {part: line(size, second.saved.get(part, 0)) for part, size in first.saved.items()}
        names = ("activations", "peak")
        on_it = {name: line(getattr(first, name), getattr(second, name)) for name in names}
        return replace(first, saved=saved, **on_it)  # type: ignore[arg-type]

    return replace(
        small,
        tokens=tokens,
        micro_batches=micro_batches,
        work={cell: work(small.work[cell], large.work[cell]) for cell in small.work},
        collectives=tuple(exchange(*pair) for pair in zip(small.collectives, large.collectives, strict=True)),
        memory=memory(small.memory, large.memory),
    )
