"""The parity gate: a small copy of a config's model in every layout of parallelism, against one process."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.common.signals import ended_by_sigterm
from moe_lm.config.model import ModelConfig
from moe_lm.config.run import ParallelConfig, PretrainConfig, RunConfig
from moe_lm.kernels.device import pick_device
from moe_lm.tools.verify.compare import Comparison, Tolerance, compare, read_steps
from moe_lm.tools.verify.layouts import PLAN, Layout, Plan, all_layouts, select
from moe_lm.tools.verify.ranks import run_ranks
from moe_lm.tools.verify.scale import AVOIDED, small_lora, small_model, strong_preference, training

WORLD_SIZES = (1, 2, 4)
SKEW = 1.5  # the fullest expert gets at least this many times its share


@dataclass(frozen=True)
class Report:
    """Every layout with how far it is from one process."""

    plan: Plan
    comparisons: list[tuple[Layout, Comparison]]
    tolerance: Tolerance
    seconds: float

    @property
    def ok(self) -> bool:
        return all(comparison.ok for _, comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "device": self.plan.parallel.device,
            "precision": self.plan.train.precision,
            "tolerance": {"loss": self.tolerance.loss, "tensor": self.tolerance.tensor},
            "seconds": round(self.seconds, 1),
            "model": self.plan.model.model_dump(mode="json"),
            "lora": self.plan.lora and self.plan.lora.model_dump(mode="json"),
            "preference": self.plan.preference and self.plan.preference.model_dump(mode="json"),
            "train": self.plan.train.model_dump(mode="json"),
            "layouts": [
                {**layout.model_dump(include={"name", "world_size", "parallel", "like"}), **comparison.as_json()}
                for layout, comparison in self.comparisons
            ],
        }


def verify(
    config: RunConfig,
    world_sizes: Sequence[int] | None = None,
    quick: bool = False,
    only: Sequence[str] = (),
    timeout_seconds: float = 600,
    sabotage: Path | None = None,
    console: Console | None = None,
) -> Report:
    """Run every layout and compare it with one process; without `world_sizes` in those that the devices are enough for.

    Raises MoeLmError when a process fails or takes too long, UsageError for more processes than devices.
    """
    started = time.monotonic()
    device = pick_device(config.parallel.device).type
    if device != "cuda":
        device = "cpu"  # DeepSpeed knows no other
    world_sizes = check_devices(world_sizes, torch.cuda.device_count() if device == "cuda" else max(WORLD_SIZES))
    model, train = small_model(trained_model(config)), training(config)
    layouts = all_layouts(model, train, world_sizes, quick)
    plan = Plan(
        model=model,
        lora=small_lora(config.lora),
        preference=strong_preference(config.preference),
        train=train,
        parallel=ParallelConfig.model_validate({"device": device, "timeout_seconds": timeout_seconds}),
        layouts=select(layouts, only) if only else layouts,
        sabotage=sabotage and sabotage.absolute(),
    )
    tolerance = Tolerance.of(train.precision)
    with ended_by_sigterm(), TemporaryDirectory(prefix="moe-lm-verify-") as name:
        folder = Path(name)
        (folder / PLAN).write_text(plan.model_dump_json(), encoding="utf-8")
        for world_size in dict.fromkeys(layout.world_size for layout in plan.layouts):
            if console is not None:
                number = sum(layout.world_size == world_size for layout in plan.layouts)
                console.print(f"processes: {world_size}, layouts: {number}")
            run_ranks("moe_lm.tools.verify.worker", folder, world_size, timeout_seconds)
        results = {layout.name: folder / str(number) for number, layout in enumerate(plan.layouts)}
        for layout in plan.layouts:
            if layout.like is None:
                check_reference(read_steps(results[layout.name]), plan)
        comparisons = [
            (layout, compare(results[layout.like], results[layout.name], tolerance, train.optimizer.lr))
            for layout in plan.layouts
            if layout.like is not None
        ]
    return Report(plan, comparisons, tolerance, time.monotonic() - started)


def trained_model(config: RunConfig) -> ModelConfig:
    """The model that the config trains; that of a fine-tuning comes with its start."""
    if isinstance(config, PretrainConfig):
        return config.model
    from moe_lm.checkpoint.start import find_start
    from moe_lm.train.finetune import model_of

    return model_of(config, find_start(config).folder)


def check_reference(steps: list[dict[str, Any]], plan: Plan) -> None:
    """Raise MoeLmError unless the steps are hard ones: with clipping, uneven routing and an expert without a token.

    A gate that passes on easy steps proves nothing.
    """
    assert plan.train.clip_norm is not None
    for record in steps:
        if record["gradient norm"] <= plan.train.clip_norm:
            raise _too_easy(f"the gradient norm {record['gradient norm']:.3g} of step {record['step']} is not clipped")
        if plan.model.num_experts_per_tok < plan.model.n_routed_experts:
            for layer, counts in enumerate(record["expert counts"]):
                if counts[AVOIDED]:
                    raise _too_easy(f"expert {AVOIDED} of MoE layer {layer} got {counts[AVOIDED]} tokens, not none")
                if max(counts) < SKEW * sum(counts) / len(counts):
                    raise _too_easy(f"MoE layer {layer} is loaded evenly in step {record['step']}: {counts}")


def _too_easy(what: str) -> MoeLmError:
    return MoeLmError(f"the steps that layouts are compared on are too easy: {what}; this is an error of the gate")


def table(report: Report) -> Table:
    """What a person reads: the largest relative differences of every layout."""
    worlds = sorted({layout.world_size for layout, _ in report.comparisons})
    sizes = ", ".join(map(str, worlds))
    view = Table(caption=f"largest relative difference from one process, in worlds of {sizes}; {report.seconds:.0f} s")
    view.add_column("layout", overflow="fold")
    for column in ("loss", "gradient", "weight"):
        view.add_column(column, justify="right", no_wrap=True)
    view.add_column("counts")
    view.add_column("")
    for layout, comparison in report.comparisons:
        view.add_row(
            layout.name,
            *(f"{comparison.worst[kind]:.0e}" for kind in ("loss", "gradient", "weight")),
            "equal" if comparison.counts_equal else "[red]differ[/]",
            "[green]ok[/]" if comparison.ok else "[red]FAIL[/]",
        )
    return view


def check_devices(world_sizes: Sequence[int] | None, devices: int) -> list[int]:
    """The numbers of processes to compare. Raises UsageError for one that was asked for and cannot be had."""
    if world_sizes is None:
        return [size for size in WORLD_SIZES if size <= devices]
    if max(world_sizes) > devices:
        raise UsageError(
            f"--world-sizes {max(world_sizes)} needs as many CUDA devices, here are {devices}; ask for fewer, or set "
            "parallel.device=cpu"
        )
    return list(world_sizes)


def parse_world_sizes(text: str | None) -> list[int] | None:
    """Numbers between commas. Raises UsageError for anything but a choice of WORLD_SIZES."""
    if text is None:
        return None
    try:
        sizes = sorted({int(item) for item in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or not set(sizes) <= set(WORLD_SIZES):
        raise UsageError(f"--world-sizes {text} is not a choice of 1, 2, 4; write it like --world-sizes 1,2")
    return sizes


def run(
    config: RunConfig,
    world_sizes: str | None,
    quick: bool,
    only: Sequence[str],
    json_file: str | None,
    timeout_seconds: float,
    sabotage: Path | None,
) -> int:
    """The verb: shows the table, or with `json_file` "-" the JSON alone, and returns the exit code."""
    messages = Console(stderr=True)
    report = verify(config, parse_world_sizes(world_sizes), quick, only, timeout_seconds, sabotage, messages)
    if json_file == "-":
        print(json.dumps(report.as_json(), indent=1))
    else:
        if json_file is not None:
            Path(json_file).write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        Console().print(table(report))
    for layout, comparison in report.comparisons:
        if comparison.first is not None:
            messages.print(
                f"{layout.name} is not like {layout.like!r}: {comparison.first}", markup=False, highlight=False,
                soft_wrap=True,
            )  # fmt: skip
    return 0 if report.ok else 1
