"""Every way to compute the same steps that the gate compares, and the runs that change from one to another."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from moe_lm.config import ModelConfig, Section
from moe_lm.verify.scale import STEPS

REFERENCE = "one process"
# The sequence-wise balance loss is a mean over rows, so packing changes what it says.
WITHOUT_SEQUENCE_LOSS = "one process, no sequence loss"
CHANGE = 2  # steps before a run goes on in another layout


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


def all_layouts(model: ModelConfig, world_sizes: list[int], quick: bool) -> list[Layout]:
    """In the order in which they can run: the largest world first, since smaller ones go on from its checkpoints."""
    layouts = []
    for world_size in sorted({*world_sizes, 1}, reverse=True):
        if world_size == 1:
            layouts += _one_process(model, quick, deepspeed=1 in world_sizes)
        else:
            layouts += _many(world_size, model, quick)
    if model.capacity_factor is not None:  # room is counted by the row
        layouts = [layout for layout in layouts if layout.sequence_loss]
    saved: set[str | None] = {None}
    possible = []
    for layout in layouts:
        if layout.load_from in saved:
            possible.append(layout)
            saved.add(layout.save_as)
    return possible


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
    widest = max(_expert_parallel_sizes(world_size, model))
    layouts = [
        Layout(name=f"{world_size} x torch", world_size=world_size, save_as=f"torch {world_size}"),
        *_grid(world_size, model, quick),
        Layout(
            name=f"{_title(world_size, widest, 2)} accumulation", world_size=world_size, parallel=deepspeed(widest, 2),
            micro_batch_size=1,
        ),
        Layout(
            name=f"{_title(world_size, widest, 2)} activation checkpointing", world_size=world_size,
            parallel=deepspeed(widest, 2), activation_checkpointing=True,
        ),
        Layout(
            name=f"{_title(world_size, widest, 3)} after ZeRO 2", world_size=world_size, parallel=deepspeed(widest, 3),
            load_from=f"sharded {world_size}",
        ),
        Layout(name=f"{world_size} x torch after DeepSpeed", world_size=world_size, load_from=f"sharded {world_size}"),
        Layout(
            name=f"{_title(world_size, widest, 2)} after torch", world_size=world_size, parallel=deepspeed(widest, 2),
            load_from=f"torch {world_size}",
        ),
    ]  # fmt: skip
    if world_size == 2:
        name = f"{_title(world_size, widest, 2)} after 4 processes"
        layouts.append(Layout(name=name, world_size=2, parallel=deepspeed(widest, 2), load_from="sharded 4"))
    if quick and world_size > 2:
        layouts = [layout for layout in layouts if layout.save_as == f"sharded {world_size}"]
    return layouts


def _grid(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    """Every size of expert parallelism with every stage of ZeRO; quickly, each of them once."""
    sizes = _expert_parallel_sizes(world_size, model)
    widest = max(sizes)
    pairs = [(size, stage) for size in sizes for stage in (1, 2, 3)]
    if quick:
        pairs = [(widest, 1), (widest, 2), (widest, 3), (sizes[0], 1)] if world_size > 1 else [(1, 2)]
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
