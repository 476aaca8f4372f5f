"""The settings of a run that goes on: which may differ from those of the checkpoint that it goes on from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.lineage import Start, read_adapter
from moe_lm.common.errors import UsageError
from moe_lm.config.reading import build_config
from moe_lm.config.run import RunConfig
from moe_lm.data.batches import MixedBatches
from moe_lm.tokenizer.tokenizer import Tokenizer

# Settings of how a run is watched, kept and fitted to its machine, not of what it computes.
MAY_CHANGE = (
    "log.", "checkpoint.", "parallel.", "train.eval_", "train.guards.", "train.micro_batch_size",
    "train.activation_checkpointing", "train.compile", "data.workers", "data.on_damage", "run_dir",
)  # fmt: skip


def changed_settings(
    folder: Path | None, config: RunConfig, tokenizer: Tokenizer, batches: MixedBatches, start: Start | None
) -> list[str]:
    """The differences from the settings, tokenizer and data of the checkpoint to go on from; `batches` take its order.

    Raises UsageError with them unless `checkpoint.allow_changes` is set.
    """
    if folder is None:
        return []
    may_change: tuple[str, ...] = MAY_CHANGE
    adapter = read_adapter(folder)
    if adapter and start and start.fingerprint == adapter.fingerprint:
        may_change += ("start_from",)  # the same base, wherever it is now
    changes = compare_config(_saved_config(folder, config), config.model_dump(mode="json"))
    changes = [change for change in changes if not change.startswith(may_change)]
    if Tokenizer.load(checkpoint.verified_path(folder, "tokenizer")).fingerprint != tokenizer.fingerprint:
        changes.append("the tokenizer is another one")
    data = checkpoint.read_text(folder, "data.sha256")
    batches.keep_order_of(data)
    if batches.fingerprint != data:
        changes.append("the training data is other data, which would repeat and skip tokens")
    if changes and not config.checkpoint.allow_changes:
        raise UsageError(
            f"{config.run_dir} holds a run with other settings ({'; '.join(changes)}); set run_dir to a new folder, "
            "undo the changes, or keep them with checkpoint.allow_changes=true"
        )
    return changes


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
