"""Every way to compute the same steps that the gate compares, and the runs that change from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.section import Section
from moe_lm.config.training import PreferenceConfig, TrainConfig
from moe_lm.tools.verify.scale import STEPS

REFERENCE = "one process"
# The sequence-wise balance loss is a mean over rows, so packing changes what it says.
WITHOUT_SEQUENCE_LOSS = "one process, no sequence loss"
CHANGE = 2  # steps before a run goes on in another layout
PLAN = "plan.json"


class Layout(Section):
    """How one run of the steps is computed. With `load_from` it begins at step CHANGE, from what another one saved."""

    name: str
    world_size: int
    parallel: dict[str, Any] = Field(default={})
    micro_batch_size: int | None = None
    activation_checkpointing: bool = False
    packed: bool = True
    sequence_loss: bool = True
    save_as: str | None = None
    load_from: str | None = None
    like: str | None = REFERENCE  # what it must equal; None for what others must equal

    @property
    def first_step(self) -> int:
        return 0 if self.load_from is None else CHANGE

    @property
    def steps(self) -> range:
        return range(self.first_step, STEPS)


class Plan(Section):
    """What the workers of a gate are to do."""

    model: ModelConfig
    lora: LoraConfig | None = None
    preference: PreferenceConfig | None = None
    train: TrainConfig
    parallel: ParallelConfig
    layouts: list[Layout]
    sabotage: Path | None = None  # a Python file to run first, with which the gate's tests plant errors


def all_layouts(model: ModelConfig, train: TrainConfig, world_sizes: list[int], quick: bool) -> list[Layout]:
    """In the order in which they can run: the largest world first, since smaller ones go on from its checkpoints."""
    layouts = []
    for world_size in sorted({*world_sizes, 1}, reverse=True):
        if world_size == 1:
            layouts += _one_process(model, quick, deepspeed=1 in world_sizes)
        else:
            layouts += _many(world_size, model, quick)
    # An expert's room is counted by the row, and own tokens are drawn by row and position: packing changes both.
    if model.capacity_factor is not None or train.scheduled_sampling is not None:
        layouts = [layout for layout in layouts if layout.sequence_loss]
    saved: set[str | None] = {None}
    possible = []
    for layout in layouts:
        if layout.load_from in saved:
            possible.append(layout)
            saved.add(layout.save_as)
    return possible


def select(layouts: list[Layout], only: Sequence[str]) -> list[Layout]:
    """The layouts of these names, with those that they are compared with or go on from.

    Raises UsageError for a name that is none of them.
    """
    unknown = [name for name in only if name not in {layout.name for layout in layouts}]
    if unknown:
        raise UsageError(
            f"--only {unknown[0]!r} is not a layout here; choose among {'; '.join(layout.name for layout in layouts)}"
        )
    wanted, files = set(only), set[str | None]()
    for layout in reversed(layouts):
        if layout.name in wanted or (layout.save_as is not None and layout.save_as in files):
            wanted |= {layout.name, *filter(None, [layout.like])}
            files.add(layout.load_from)
    return [layout for layout in layouts if layout.name in wanted]


def deepspeed(expert_parallel: int, stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "expert_parallel_size": expert_parallel, "zero_stage": stage}


def _one_process(model: ModelConfig, quick: bool, deepspeed: bool) -> list[Layout]:
    layouts = [
        Layout(name=REFERENCE, world_size=1, like=None),
        Layout(name="accumulation", world_size=1, micro_batch_size=2),
        Layout(name="activation checkpointing", world_size=1, activation_checkpointing=True),
        Layout(name=WITHOUT_SEQUENCE_LOSS, world_size=1, sequence_loss=False, like=None),
        Layout(
            name="documents in rows of their own", world_size=1, packed=False, sequence_loss=False,
            like=WITHOUT_SEQUENCE_LOSS,
        ),
        Layout(name="1 process after DeepSpeed", world_size=1, load_from="sharded 2"),
    ]  # fmt: skip
    if deepspeed:
        layouts += _grid(1, model, quick)
    return layouts


def _many(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    layouts = [
        Layout(name=f"{world_size} x torch", world_size=world_size, save_as=f"torch {world_size}"),
        *_grid(world_size, model, quick),
    ]
    if world_size == 2:
        layouts += _two_processes(model)
    elif quick:
        both = _title(world_size, 2, 3)  # experts divided, and each kept by several ranks
        layouts = [layout for layout in layouts if layout.name == both or layout.save_as == f"sharded {world_size}"]
    return layouts


def _two_processes(model: ModelConfig) -> list[Layout]:
    """What goes with the widest expert parallelism: two ranks show it as well as four."""
    widest = max(_expert_parallel_sizes(2, model))
    title = f"{_title(2, widest, 2)}"
    two, three = deepspeed(widest, 2), deepspeed(widest, 3)
    return [
        Layout(name=f"{title}, accumulation", world_size=2, parallel=two, micro_batch_size=1),
        Layout(name=f"{title}, activation checkpointing", world_size=2, parallel=two, activation_checkpointing=True),
        Layout(
            name=f"{title}, offload",
            world_size=2,
            parallel=two | {"offload_optimizer": True},
            save_as="offloaded",
        ),
        Layout(
            name=f"{_title(2, widest, 3)}, offload, after ZeRO 2",
            world_size=2,
            parallel=three | {"offload_optimizer": True},
            load_from="offloaded",
        ),
        Layout(name=f"{title} after 4 processes", world_size=2, parallel=two, load_from="sharded 4"),
        Layout(name=f"{title} after torch", world_size=2, parallel=two, load_from="torch 2"),
        Layout(name=f"{_title(2, widest, 3)} after ZeRO 2", world_size=2, parallel=three, load_from="sharded 2"),
        Layout(name="2 x torch after DeepSpeed", world_size=2, load_from="sharded 2"),
    ]


def _grid(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    """Every size of expert parallelism with every stage of ZeRO; quickly, each of them once."""
    sizes = _expert_parallel_sizes(world_size, model)
    widest = max(sizes)
    pairs = [(size, stage) for size in sizes for stage in (1, 2, 3)]
    if quick:
        pairs = [(widest, 1), (widest, 2), (widest, 3), (sizes[0], 1)] if world_size > 1 else [(1, 2)]
        pairs += [(2, 3)] if world_size == 4 and 2 in sizes else []
    saved = (widest, 2)
    return [
        Layout(
            name=_title(world_size, size, stage),
            world_size=world_size,
            parallel=deepspeed(size, stage),
            save_as=f"sharded {world_size}" if (size, stage) == saved and world_size > 1 else None,
        )
        for size, stage in dict.fromkeys(pairs)
    ]


def _expert_parallel_sizes(world_size: int, model: ModelConfig) -> list[int]:
    experts = model.n_routed_experts
    return [n for n in (1, 2, 4) if world_size % n == 0 and (n == 1 or (experts and experts % n == 0))]


def _title(world_size: int, expert_parallel: int, stage: int) -> str:
    return f"{world_size} x DeepSpeed, EP {expert_parallel}, ZeRO {stage}"
