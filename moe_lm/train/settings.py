"""The settings of a run that goes on: which may differ from those of the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import OPTIMIZER
from moe_lm.checkpoint.lineage import START, Adapter, Start, is_at, read_adapter
from moe_lm.common.errors import UsageError
from moe_lm.config.moved import paths_in, way_from
from moe_lm.config.reading import build_config
from moe_lm.config.run import PretrainConfig, RunConfig
from moe_lm.data.batches import MixedBatches
from moe_lm.data.order import block_shares
from moe_lm.optim.groups import first_other_rate
from moe_lm.tokenizer.tokenizer import Tokenizer

# Settings of how a run is watched, kept and fitted to its machine, not of what it computes.
MAY_CHANGE = (
    "log.", "checkpoint.", "parallel.", "train.hours", "train.eval_", "train.guards.", "train.micro_batch_size",
    "train.activation_checkpointing", "train.compile", "data.workers", "data.on_damage", "data.tokenizer",
    "data.shards", "data.cache_bytes", "run_dir",
)  # fmt: skip


LISTS = ("train", "validation")  # of conversations or pairs


def changed_settings(
    folder: Path | None, config: RunConfig, tokenizer: Tokenizer, batches: MixedBatches, start: Start | None
) -> list[str]:
    """The differences from the settings, tokenizer and data of the checkpoint to go on from; `batches` take its order.

    Raises UsageError with them unless `checkpoint.allow_changes` is set, and for what that cannot help.
    """
    if folder is None:
        return []
    check_can_go_on(folder, config)
    may_change: tuple[str, ...] = MAY_CHANGE
    if start is not None and _is_still(config.start_from, start, read_adapter(folder)):
        may_change += ("start_from",)  # the same model, wherever it is now
    saved = _saved_config(folder, config)
    check_states(saved, config)
    if (late := late_change_of_steps(saved, config, folder)) is None:
        may_change += ("train.steps",)
    reads_the_same = isinstance(config, PretrainConfig) and has_read_the_same(saved, config, checkpoint.step_of(folder))
    if reads_the_same:
        may_change += ("data.phases", "data.sources")  # a source is known by its fingerprint
    changes = compare_config(with_places_of(config, saved), config.model_dump(mode="json"))
    changes = [change for change in changes if not change.startswith(may_change)]
    if not reads_the_same and isinstance(config, PretrainConfig) and config.data.phases:
        changes.append("with these phases, the steps that are done would have read other rows")
    if Tokenizer.load(checkpoint.verified_path(folder, "tokenizer")).fingerprint != tokenizer.fingerprint:
        changes.append("the tokenizer is another one")
    data = checkpoint.read_text(folder, "data.sha256")
    batches.keep_order_of(data)
    if batches.fingerprint != data:
        changes.append("the training data is other data, which would repeat and skip tokens")
    if changes and not config.checkpoint.allow_changes:
        if late and all(change.startswith("train.steps:") for change in changes):
            raise late
        raise UsageError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(changes)}); set run_dir to a new folder, "
            "undo the changes, or keep them with checkpoint.allow_changes=true"
        )
    if late and config.train.steps < checkpoint.step_of(folder):
        raise late  # steps that are done are not undone, whatever is allowed
    return changes


def check_can_go_on(folder: Path, config: RunConfig) -> None:
    """Raise UsageError for a checkpoint that no training has left, and for a start that comes after the beginning."""
    entries = checkpoint.entries(folder)
    if not any(entry.startswith(f"{OPTIMIZER}/") for entry in entries):
        raise UsageError(
            f"{config.run_dir} holds a model without the state of an optimizer, as merge, import and upcycle make it; "
            f"begin another run with start_from={config.run_dir}"
        )
    if isinstance(config, PretrainConfig) and config.start_from is not None and START not in entries:
        raise UsageError(
            f"start_from={config.start_from}: {config.run_dir} has begun with fresh weights, and goes on from its own "
            "checkpoint; take start_from away, or set run_dir to a new folder"
        )


def check_states(saved: Mapping[str, Any], config: RunConfig) -> None:
    """Raise UsageError for a setting whose states of the optimizer the steps that are done have not kept."""
    train, now = saved.get("train", {}), config.train
    before = train.get("optimizer", {})
    had, name = before.get("name", now.optimizer.name), now.optimizer.name
    change = None
    if had != name and "muon" in (had, name):  # the moments of the others have the same names
        change = f"optimizer.name: {had} -> {name}"
    elif before.get("ema_decay") is None and now.optimizer.ema_decay is not None:
        change = f"optimizer.ema_decay: null -> {now.optimizer.ema_decay}"
    elif train.get("freeze_router") and not now.freeze_router and config.lora is None:
        change = f"freeze_router: true -> {str(now.freeze_router).lower()}"
    if change is not None and "optimizer" in train:
        raise UsageError(
            f"train.{change} needs states of the optimizer that the checkpoints in {config.run_dir} do not have; undo "
            f"the change, or begin another run with start_from={config.run_dir}"
        )


def with_places_of(config: RunConfig, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved settings with the paths of fine-tuning data as they are now, where these are no other settings.

    Rows to train on are known by their fingerprint, and held-out rows by the way from the run folder.
    """
    if isinstance(config, PretrainConfig) or "model" in saved:
        return saved
    saved, given = deepcopy(saved), config.model_dump(mode="json")
    for name in LISTS:
        before, now = (paths_in({"data": {name: values["data"].get(name)}}) for values in (saved, given))
        for (old, key), (new, place) in zip(list(before), list(now), strict=False):
            ways = way_from(saved["run_dir"], old[key]), way_from(given["run_dir"], new[place])
            if name == "train" or ways[0] == ways[1] is not None:
                old[key] = new[place]
    return saved


def _is_still(start_from: Path | None, start: Start, adapter: Adapter | None) -> bool:
    """Whether `start_from` names the model that the run began with; the base of adapters was looked at before."""
    known = start.fingerprint
    return (adapter is not None and adapter.fingerprint == known) or (
        start_from is not None and is_at(start_from, known)
    )


def late_change_of_steps(saved: Mapping[str, Any], config: RunConfig, folder: Path) -> UsageError | None:
    """The error for a last step that comes too late; None if the steps that are done had the same rates."""
    train, done = config.train, checkpoint.step_of(folder)
    if train.steps < done:
        return UsageError(
            f"train.steps={train.steps} is less than the {done} steps that {config.run_dir} has done; give at least "
            f"{done}, or begin another run with start_from={folder}"
        )
    before = saved.get("train", {}).get("steps", train.steps)
    changed = first_other_rate(done, before, train.steps, train.schedule)
    if changed is None:
        return None
    sooner = [path for step, path in sorted(checkpoint.complete_checkpoints(folder.parent).items()) if step <= changed]
    return UsageError(
        f"train.steps: {before} -> {train.steps} comes too late: {done} steps are done, and "
        f"train.schedule.name={train.schedule.name} would have given other rates from step {changed + 1} on; "
        f"begin another run with start_from={sooner[-1] if sooner else config.run_dir}, or keep the change with "
        "checkpoint.allow_changes=true"
    )


def has_read_the_same(saved: Mapping[str, Any], config: PretrainConfig, done: int) -> bool:
    """Whether the steps that are done have read the rows that this config gives them; what follows may be changed."""
    try:
        before = PretrainConfig.model_validate(saved)
    except (ValidationError, UsageError):  # of another stage
        return False
    return past_of(before, done) == past_of(config, done)


class Past(NamedTuple):
    """What decides which rows the finished steps have read, apart from the sources' content and the seed."""

    longest: list[int]  # windows of each source that was read
    phases: list[tuple[int, int, tuple[int, ...]]]  # that have begun: first step, length of rows, shares of the sources


def past_of(config: PretrainConfig, done: int) -> Past:
    phases = config.phases
    begun = [phase for phase in phases if phase.first_step < done]
    read = [place for place in range(len(config.data.sources)) if any(phase.weights[place] for phase in begun)]
    longest = [max(phase.sequence_length for phase in phases if phase.weights[place]) for place in read]
    return Past(
        longest, [(phase.first_step, phase.sequence_length, tuple(block_shares(phase.weights))) for phase in begun]
    )


def compare_config(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line `section.key: old -> new` for every setting that differs, in the order of the new config."""
    before, after = dict(flat_settings(old)), dict(flat_settings(new))
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in dict.fromkeys([*after, *before])
        if before.get(key, absent) != after.get(key, absent)
    ]


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each setting with its path, like `train.optimizer.lr`."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat_settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _saved_config(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The config of a checkpoint, in which settings younger than it have their defaults."""
    values: dict[str, Any] = checkpoint.read_section(folder, "config.yaml")
    try:
        return build_config(type(config), values, f"{folder}/config.yaml").model_dump(mode="json")
    except UsageError:  # of another stage, or with a setting that no longer exists
        return values
