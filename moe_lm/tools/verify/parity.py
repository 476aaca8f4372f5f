"""The parity check: a small copy of a config's model, trained in every layout of parallelism and in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_lm.common.errors import UsageError
from moe_lm.config.run import ParallelConfig, RunConfig
from moe_lm.kernels.device import compiling_needs, pick_device
from moe_lm.tools.ranks import run_ranks
from moe_lm.tools.verify.deviation import Deviation, Tolerance, deviation_of, read_steps
from moe_lm.tools.verify.layouts import PLAN, Layout, Plan, all_layouts, select, shares_rows
from moe_lm.tools.verify.scale import AVOIDED, small_lora, small_model, strong_preference, training
from moe_lm.train.finetune import trained_model

WORLD_SIZES = (1, 2, 4)
SKEW = 1.25  # the fullest expert of an uneven layer gets at least this many times its share


def run(
    config: RunConfig,
    world_sizes: str | None,
    quick: bool,
    only: Sequence[str],
    json_file: str | None,
    timeout_seconds: float,
    sabotage: Path | None,
) -> int:
    """Run the verb `verify` and return its exit code. Prints the table, or only JSON when `json_file` is "-"."""
    messages = Console(stderr=True)
    report = verify(config, world_sizes, quick, only, timeout_seconds, sabotage, messages)
    content = json.dumps(report.as_json(), indent=1)
    if json_file == "-":
        print(content)
    else:
        if json_file is not None:
            Path(json_file).write_text(content + "\n", encoding="utf-8")
        Console().print(table(report))
    for note in report.notes:
        messages.print(f"note: {note}; an error there may not show", markup=False, highlight=False, soft_wrap=True)
    for layout, deviation in report.deviations:
        if deviation.first is not None:
            line = f"{layout.name} is not like {layout.like!r}: {deviation.first}"
            messages.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if report.ok else 1


@dataclass(frozen=True)
class ParityReport:
    """Every layout with its deviation from its reference. `notes`: what this config cannot show."""

    plan: Plan
    deviations: list[tuple[Layout, Deviation]]
    tolerance: Tolerance
    seconds: float
    notes: list[str]

    @property
    def ok(self) -> bool:
        return all(deviation.ok for _, deviation in self.deviations)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "device": self.plan.parallel.device,
            "precision": self.plan.train.precision,
            "tolerance": {"loss": self.tolerance.loss, "tensor": self.tolerance.tensor},
            "seconds": round(self.seconds, 1),
            "notes": self.notes,
            **self.plan.model_dump(mode="json", include={"model", "lora", "preference", "train"}),
            "layouts": [
                layout.model_dump(include={"name", "world_size", "parallel", "like"}) | deviation.as_json()
                for layout, deviation in self.deviations
            ],
        }


def verify(
    config: RunConfig,
    world_sizes: str | None,
    quick: bool,
    only: Sequence[str],
    timeout_seconds: float,
    sabotage: Path | None,
    messages: Console,
) -> ParityReport:
    """Run every layout and compare it with one process.

    Raises MoeLmError when a process fails or takes too long, UsageError for a choice that this machine does not have.
    """
    started = time.monotonic()
    device = "cuda" if pick_device(config.parallel.device).type == "cuda" else "cpu"  # DeepSpeed knows no other
    sizes = choose_world_sizes(world_sizes, torch.cuda.device_count() if device == "cuda" else max(WORLD_SIZES))
    model, train = small_model(trained_model(config)), training(config)
    layouts = all_layouts(model, train, sizes, quick)
    if config.preference is not None:
        layouts = [layout for layout in layouts if not shares_rows(layout)]  # pairs are compared whole
    notes: list[str] = []
    if not quick and (needed := compiling_needs(torch.device(device))):
        layouts = [layout for layout in layouts if not layout.compile]
        notes.append(f"no layout is compiled, which needs {needed}")
    plan = Plan(
        model=model,
        lora=small_lora(config.lora),
        preference=strong_preference(config.preference),
        train=train,
        parallel=ParallelConfig.model_validate({"device": device, "timeout_seconds": timeout_seconds}),
        layouts=select(layouts, only),
        sabotage=sabotage and sabotage.absolute(),
    )
    tolerance = Tolerance.of(train.precision)
    with TemporaryDirectory(prefix="moe-lm-verify-") as name:
        folder = Path(name)
        (folder / PLAN).write_text(plan.model_dump_json(), encoding="utf-8")
        for world_size in dict.fromkeys(layout.world_size for layout in plan.layouts):
            here = [layout for layout in plan.layouts if layout.world_size == world_size]
            messages.print(f"processes: {world_size}, layouts: {len(here)}")
            compiling = any(layout.compile for layout in here)
            run_ranks("moe_lm.tools.verify.worker", folder, world_size, timeout_seconds, compiling=compiling)
        results = {layout.name: folder / str(number) for number, layout in enumerate(plan.layouts)}
        deviations: list[tuple[Layout, Deviation]] = []
        for layout in plan.layouts:
            if layout.like is None:
                if layout.bias_update == "quantile":
                    continue  # from the second step on no load is uneven, which is what it is for
                notes += islice(easy_steps(read_steps(results[layout.name]), plan), 1)
            else:
                found, reference = results[layout.name], results[layout.like]
                deviations.append((layout, deviation_of(found, reference, tolerance, train.optimizer.lr)))
    return ParityReport(plan, deviations, tolerance, time.monotonic() - started, notes)


def easy_steps(steps: list[dict[str, Any]], plan: Plan) -> Iterator[str]:
    """What makes a step easy that was meant to be hard: clipped, unevenly routed, with an expert that gets no token.

    A check that passes on easy steps proves less; it is no deviation.
    """
    assert plan.train.clip_norm is not None
    for record in steps:
        if record["gradient norm"] <= plan.train.clip_norm:
            yield f"the gradient of step {record['step']}, of norm {record['gradient norm']:.3g}, is not clipped"
        if plan.model.num_experts_per_tok < plan.model.n_routed_experts:
            for layer, counts in enumerate(record["expert counts"]):
                if counts[AVOIDED]:
                    yield f"no expert of MoE layer {layer} is without a token in step {record['step']}: {counts}"
                if max(counts) < SKEW * sum(counts) / len(counts):
                    yield f"MoE layer {layer} is loaded evenly in step {record['step']}: {counts}"


def table(report: ParityReport) -> Table:
    """The largest relative differences of every layout, to print."""
    worlds = sorted({layout.world_size for layout, _ in report.deviations})
    sizes = ", ".join(map(str, worlds))
    view = Table(caption=f"largest relative difference from one process, in worlds of {sizes}; {report.seconds:.0f} s")
    view.add_column("layout", overflow="fold")
    for column in ("loss", "gradient", "weight"):
        view.add_column(column, justify="right", no_wrap=True)
    view.add_column("counts")
    view.add_column("")
    for layout, deviation in report.deviations:
        view.add_row(
            layout.name,
            *(f"{deviation.worst[kind]:.0e}" for kind in ("loss", "gradient", "weight")),
            "equal" if deviation.counts_equal else "[red]differ[/]",
            "[green]ok[/]" if deviation.ok else "[red]FAIL[/]",
        )
    return view


def choose_world_sizes(text: str | None, devices: int) -> list[int]:
    """The numbers of processes between the commas of `text`, by default all that there are enough devices for.

    Raises UsageError for anything but a choice of WORLD_SIZES, and for one that has too few devices.
    """
    if text is None:
        return [size for size in WORLD_SIZES if size <= devices]
    numbers = {number.strip() for number in text.split(",")}
    sizes = [size for size in WORLD_SIZES if str(size) in numbers]
    if len(sizes) < len(numbers):
        raise UsageError(f"--world-sizes {text} is not a choice of 1, 2, 4; write it like --world-sizes 1,2")
    if sizes[-1] > devices:
        raise UsageError(
            f"--world-sizes {sizes[-1]} needs {sizes[-1]} CUDA devices, and this machine has {devices}; ask for fewer, "
            "or set parallel.device=cpu"
        )
    return sizes
