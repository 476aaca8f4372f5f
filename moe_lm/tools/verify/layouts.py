"""The layouts that the parity check compares, each a way to compute the same steps, and the changes between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moe_lm.common.errors import UsageError
from moe_lm.config.model import LoraConfig, ModelConfig
from moe_lm.config.run import ParallelConfig
from moe_lm.config.section import Section
from moe_lm.config.training import PreferenceConfig, Recomputation, TrainConfig
from moe_lm.tools.verify.scale import STEPS

REFERENCE = "one process"
# The sequence-wise balance loss is a mean over rows, so packing changes its value.
WITHOUT_SEQUENCE_LOSS = "one process, no sequence loss"
OTHER_OPTIMIZERS: dict[Literal["muon", "lamb"], str] = {"muon": "Muon", "lamb": "LAMB"}
QUANTILE = "quantile balancing"
LOSS_CHUNK = 20  # does not divide the positions of a micro-batch
CHANGE = 2  # steps before a run goes on in another layout
PLAN = "plan.json"


class Layout(Section):
    """One way to compute the steps. With `load_from` it begins at step CHANGE, from the checkpoint of that name."""

    name: str
    world_size: int
    parallel: dict[str, Any] = Field(default={})
    micro_batch_size: int | None = None
    activation_checkpointing: Recomputation = "none"
    compile: bool = False
    loss_chunk: int | None = None  # positions whose logits are in memory at once; None: all of the small model's
    expert_groups: int = 1  # sums of a token's experts that are added up, as with so many expert-parallel ranks
    packed: bool = True
    sequence_loss: bool = True
    optimizer: Literal["adamw", "muon", "lamb"] = "adamw"
    bias_update: Literal["sign", "quantile"] = "sign"
    save_as: str | None = None
    load_from: str | None = None
    like: str | None = REFERENCE  # the layout that it must equal; None: it is a reference itself

    @property
    def steps(self) -> range:
        return range(0 if self.load_from is None else CHANGE, STEPS)


class Plan(Section):
    """The work of all ranks: a model, its training, and the layouts."""

    model: ModelConfig
    lora: LoraConfig | None = None
    preference: PreferenceConfig | None = None
    train: TrainConfig
    parallel: ParallelConfig
    layouts: list[Layout]
    sabotage: Path | None = None  # a Python file that every rank runs first; tests plant errors with it


def all_layouts(model: ModelConfig, train: TrainConfig, world_sizes: list[int], quick: bool) -> list[Layout]:
    """The layouts in an order that can run: the largest world first, since smaller ones load its checkpoints."""
    layouts = []
    for world_size in sorted({*world_sizes, 1}, reverse=True):
        if world_size == 1:
            layouts += _one_process(model, quick, deepspeed=1 in world_sizes)
        else:
            layouts += _many(world_size, model, quick)
        if not (quick and world_size > 2):
            layouts += _other_optimizers(world_size, model, train.precision, quick)
            layouts += _quantile_balancing(world_size, model, quick)
    # An expert's capacity is counted per row, and the model's own tokens are drawn by row and position: packing changes
    # both, and ranks that share rows know neither.
    if model.capacity_factor is not None or train.scheduled_sampling is not None:
        layouts = [layout for layout in layouts if layout.sequence_loss and not shares_rows(layout)]
    if train.precision == "bfloat16":
        layouts = _beside_sums_of_groups(layouts)
    saved: set[str | None] = {None}
    possible = []
    for layout in layouts:
        if layout.load_from in saved:
            possible.append(layout)
            saved.add(layout.save_as)
    return possible


def _beside_sums_of_groups(layouts: list[Layout]) -> list[Layout]:
    """Compare expert parallelism with one process that rounds where it does (groups.py)."""
    references: dict[int, Layout] = {}
    compared = []
    for layout in layouts:
        size = layout.parallel.get("expert_parallel_size", 1)
        if size > 1 and layout.like == REFERENCE:
            name = f"{REFERENCE}, experts in {size} groups"
            references.setdefault(size, Layout(name=name, world_size=1, expert_groups=size, like=None))
            layout = layout.model_copy(update={"like": name})
        compared.append(layout)
    return [*compared, *references.values()]


def select(layouts: list[Layout], only: Sequence[str]) -> list[Layout]:
    """The layouts of these names (without names, all), and those that they are compared with or load from.

    Raises UsageError for an unknown name.
    """
    if not only:
        return layouts
    names = [layout.name for layout in layouts]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UsageError(f"--only {unknown[0]!r} is not a layout here; choose among {'; '.join(names)}")
    wanted, files = set(only), set[str | None]()
    for layout in reversed(layouts):
        if layout.name in wanted or (layout.save_as is not None and layout.save_as in files):
            wanted |= {layout.name, *filter(None, [layout.like])}
            files.add(layout.load_from)
    return [layout for layout in layouts if layout.name in wanted]


def deepspeed(expert_parallel: int, stage: int) -> dict[str, Any]:
    return {"engine": "deepspeed", "expert_parallel_size": expert_parallel, "zero_stage": stage}


def shares_rows(layout: Layout) -> bool:
    """Whether ranks share the rows of the batch in it."""
    return layout.parallel.get("sequence_parallel_size", 1) > 1


def _one_process(model: ModelConfig, quick: bool, deepspeed: bool) -> list[Layout]:
    layouts = [
        Layout(name=REFERENCE, world_size=1, like=None),
        Layout(name="accumulation", world_size=1, micro_batch_size=2),
        Layout(name="activation checkpointing", world_size=1, activation_checkpointing="full"),
        Layout(name="selective checkpointing", world_size=1, activation_checkpointing="selective"),
        Layout(name="loss in chunks", world_size=1, loss_chunk=LOSS_CHUNK),
        Layout(name=WITHOUT_SEQUENCE_LOSS, world_size=1, sequence_loss=False, like=None),
        Layout(
            name="documents in rows of their own", world_size=1, packed=False, sequence_loss=False,
            like=WITHOUT_SEQUENCE_LOSS,
        ),
        Layout(name="1 process after DeepSpeed", world_size=1, load_from="sharded 2"),
    ]  # fmt: skip
    if not quick:
        layouts.append(Layout(name="compiled", world_size=1, compile=True))
    return layouts + _grid(1, model, quick) if deepspeed else layouts


def _many(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    layouts = [
        Layout(name=f"{world_size} x torch", world_size=world_size, save_as=f"torch {world_size}"),
        *_grid(world_size, model, quick),
        *_in_parts_of_rows(world_size, model, quick),
    ]
    if world_size == 2:
        layouts += _two_processes(model, quick)
    elif quick:
        both = _title(world_size, 2, 3)  # experts are divided, and several ranks keep each of them
        layouts = [layout for layout in layouts if layout.name == both or layout.save_as == f"sharded {world_size}"]
    return layouts


def _two_processes(model: ModelConfig, quick: bool) -> list[Layout]:
    """The variants of the widest expert parallelism, which two ranks show as well as four."""
    widest = max(_expert_parallel_sizes(2, model))
    one, two, three = (deepspeed(widest, stage) for stage in (1, 2, 3))
    whole, title, sharded = (_title(2, widest, stage) for stage in (1, 2, 3))
    offload = {"offload_optimizer": True}

    def layout(name: str, parallel: dict[str, Any], **settings: Any) -> Layout:
        return Layout(name=name, world_size=2, parallel=parallel, **settings)

    compiled = layout(f"{whole}, compiled", one, activation_checkpointing="selective", compile=True)
    return [
        *([] if quick else [compiled]),
        layout(f"{title}, accumulation", two, micro_batch_size=1),
        layout(f"{title}, activation checkpointing", two, activation_checkpointing="full"),
        layout(f"{whole}, selective checkpointing", one, activation_checkpointing="selective"),
        layout(f"{sharded}, selective checkpointing", three, activation_checkpointing="selective"),
        layout(f"{title}, offload", two | offload, save_as="offloaded"),
        layout(f"{sharded}, offload, after ZeRO 2", three | offload, load_from="offloaded"),
        layout(f"{title} after 4 processes", two, load_from="sharded 4"),
        layout(f"{title} after torch", two, load_from="torch 2"),
        layout(f"{sharded} after ZeRO 2", three, load_from="sharded 2"),
        layout("2 x torch after DeepSpeed", {}, load_from="sharded 2"),
    ]


def _in_parts_of_rows(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    """Sequence parallelism, which needs no DeepSpeed and goes with all that it divides; with `quick` once."""
    widest = max(_expert_parallel_sizes(2, model))

    def layout(title: str, size: int, parallel: dict[str, Any], **settings: Any) -> Layout:
        parallel = parallel | {"sequence_parallel_size": size}
        return Layout(name=f"{title}, SP {size}", world_size=world_size, parallel=parallel, **settings)

    def sharded(size: int, stage: int, suffix: str = "", **settings: Any) -> Layout:
        return layout(_title(world_size, widest, stage) + suffix, size, deepspeed(widest, stage), **settings)

    if quick:
        return [sharded(2, 2, micro_batch_size=4)] if world_size == 2 else []
    torch = f"{world_size} x torch"
    if world_size == 4:
        return [layout(torch, 2, {}), layout(torch, 4, {}), *(sharded(4, stage) for stage in (1, 2, 3)), sharded(2, 3)]
    full, selective = "full", "selective"
    return [
        layout(torch, 2, {}),
        *(sharded(2, stage) for stage in (1, 3)),
        sharded(2, 2, micro_batch_size=4),
        sharded(2, 2, ", activation checkpointing", activation_checkpointing=full),
        sharded(2, 3, ", selective checkpointing", activation_checkpointing=selective),
        sharded(2, 1, ", compiled", activation_checkpointing=selective, compile=True),
        layout(f"{torch}, compiled", 2, {}, compile=True),
        sharded(2, 2, " after 4 processes", load_from="sharded 4"),
        layout(f"{torch} after DeepSpeed", 2, {}, load_from="sharded 2"),
    ]


def _other_optimizers(world_size: int, model: ModelConfig, precision: str, quick: bool) -> list[Layout]:
    """Muon only in float32: Newton-Schulz multiplies the rounding of bfloat16 beyond what an error would change."""
    layouts = []
    for name, title in OTHER_OPTIMIZERS.items():
        if name == "muon" and precision == "bfloat16":
            continue
        reference = f"{REFERENCE}, {title}"

        def layout(
            what: str, name: Any = name, title: str = title, like: str | None = reference, **settings: Any
        ) -> Layout:
            return Layout(name=f"{what}, {title}", world_size=world_size, optimizer=name, like=like, **settings)

        if world_size == 1:
            layouts.append(layout(REFERENCE, like=None))
            layouts.append(layout("accumulation", micro_batch_size=2))
            continue
        layouts.append(layout(f"{world_size} x torch"))
        sizes = _expert_parallel_sizes(world_size, model)
        widest, saved = max(sizes), f"{title} {world_size}"
        for size in sizes:
            for stage in (1, 2, 3):
                kept = size == widest and stage == 2
                if not quick or (kept and name == "muon"):
                    divided, save_as = deepspeed(size, stage), saved if kept else None
                    layouts.append(layout(_title(world_size, size, stage), parallel=divided, save_as=save_as))
        if world_size == 2 and not quick:
            one, three = deepspeed(widest, 1), deepspeed(widest, 3) | {"offload_optimizer": True}
            layouts += [
                layout(f"{_title(2, widest, 1)} after 4 processes", parallel=one, load_from=f"{title} 4"),
                layout(f"{_title(2, widest, 3)}, offload, after ZeRO 2", parallel=three, load_from=saved),
                layout("2 x torch after DeepSpeed", load_from=saved),
            ]
    return layouts


def _quantile_balancing(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    """The biases are set from counts of all tokens; an expert whose scores are all chosen has none to set."""
    if model.num_experts_per_tok >= model.n_routed_experts:
        return []
    reference = f"{REFERENCE}, {QUANTILE}"

    def layout(name: str, like: str | None = reference, **settings: Any) -> Layout:
        name = f"{name}, {QUANTILE}"
        return Layout(name=name, world_size=world_size, bias_update="quantile", like=like, **settings)

    if world_size == 1:
        accumulation = [] if quick else [layout("accumulation", micro_batch_size=2)]
        return [layout(REFERENCE, like=None), *accumulation]
    widest = max(_expert_parallel_sizes(world_size, model))
    stages = (2,) if quick else (1, 2, 3)
    divided = [layout(_title(world_size, widest, stage), parallel=deepspeed(widest, stage)) for stage in stages]
    return divided if quick else [layout(f"{world_size} x torch"), *divided]


def _grid(world_size: int, model: ModelConfig, quick: bool) -> list[Layout]:
    """Every size of expert parallelism with every stage of ZeRO; with `quick`, each of them once."""
    sizes = _expert_parallel_sizes(world_size, model)
    widest = max(sizes)
    pairs = [(size, stage) for size in sizes for stage in (1, 2, 3)]
    if quick:
        pairs = [(widest, 1), (widest, 2), (widest, 3), (sizes[0], 1)] if world_size > 1 else [(1, 2)]
        pairs += [(2, 3)] if world_size == 4 and 2 in sizes else []
    saved = (widest, 2) if world_size > 1 else None
    return [
        Layout(
            name=_title(world_size, *pair),
            world_size=world_size,
            parallel=deepspeed(*pair),
            save_as=f"sharded {world_size}" if pair == saved else None,
        )
        for pair in dict.fromkeys(pairs)
    ]


def _expert_parallel_sizes(world_size: int, model: ModelConfig) -> list[int]:
    experts = model.n_routed_experts
    return [n for n in (1, 2, 4) if world_size % n == 0 and (n == 1 or (experts and experts % n == 0))]


def _title(world_size: int, expert_parallel: int, stage: int) -> str:
    return f"{world_size} x DeepSpeed, EP {expert_parallel}, ZeRO {stage}"
