"""A run's checkpoints: what there is, whether it is sound, how two of them differ, and which to delete."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from moe_lm.checkpoint import checkpoint, lineage, recovery, retain
from moe_lm.checkpoint.checkpoint import COMPLETE, DAMAGED, DOUBTFUL, MODEL, OPTIMIZER, PINNED, UnreadableError
from moe_lm.checkpoint.read import CheckpointTensors
from moe_lm.checkpoint.safetensors_file import as_bytes, pieces_of
from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.train.folder import RunFolder
from moe_lm.train.settings import compare_config


@dataclass(frozen=True)
class Listed:
    """A checkpoint of a run, as `list` shows it."""

    name: str
    step: int
    saved: str  # local time, ISO 8601
    bytes: int
    loss: float | None
    held_out_loss: float | None
    best: bool
    notes: list[str]  # pinned and why, doubtful and why, damaged and how, or unfinished


# List


def listed(run: Path) -> list[Listed]:
    """The checkpoints of a run by step, damaged and unfinished ones too. Raises UsageError if there is no such run."""
    checkpoints = _checkpoints_of(run)
    best = retain.best(checkpoints)
    found = sorted(checkpoint.step_folders(checkpoints), key=lambda item: (item[1], item[2]))
    return [_listed(folder, step, suffix, folder == best) for folder, step, suffix in found]


def table(rows: list[Listed]) -> str:
    """The text of `list`."""
    lines: list[tuple[str, ...]] = [("checkpoint", "saved", "MB", "loss", "held-out", "")]
    for row in rows:
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (row.loss, row.held_out_loss))
        notes = "; ".join((["best"] if row.best else []) + row.notes)
        lines.append((row.name, row.saved.replace("T", " "), f"{row.bytes / 1e6:,.1f}", *losses, notes))
    widths = [max(len(line[place]) for line in lines) for place in range(5)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  {line[1]:<{widths[1]}}  {line[2]:>{widths[2]}}  {line[3]:>{widths[3]}}  "
        f"{line[4]:>{widths[4]}}  {line[5]}".rstrip()
        for line in lines
    )


def began_with(run: Path) -> str | None:
    """A line on the model that a run of another's weights began with."""
    newest = checkpoint.latest_readable(_checkpoints_of(run))
    if newest is None or lineage.START not in checkpoint.entries(newest):
        return None
    start = checkpoint.read_section(newest, lineage.START)
    return f"trained on from {start['origin']}"


def as_json(rows: list[Listed]) -> list[dict[str, Any]]:
    """What `list --json` prints."""
    return [asdict(row) for row in rows]


def _listed(folder: Path, step: int, suffix: str, best: bool) -> Listed:
    notes = []
    for what, file in (("pinned", folder / PINNED), ("doubtful", folder / DOUBTFUL)):
        if file.is_file():
            notes.append(f"{what}: {file.read_text(encoding='utf-8', errors='replace').strip()}")
    if suffix == DAMAGED:
        notes.append(f"damaged: {recovery.why(folder)}")
    elif suffix.endswith(".tmp"):
        notes.append("unfinished")
    elif not (folder / COMPLETE).is_file():
        notes.append(f"damaged: it has no {COMPLETE}")
    whole = folder / COMPLETE if (folder / COMPLETE).is_file() else folder
    return Listed(
        name=folder.name,
        step=step,
        saved=datetime.fromtimestamp(whole.stat().st_mtime).isoformat(timespec="seconds"),
        bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        loss=retain.training_loss(folder),
        held_out_loss=retain.held_out_loss(folder),
        best=best,
        notes=notes,
    )


# Verify


def verify(path: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every file that is not as it was written, in a checkpoint or in each of a run's.

    Raises UsageError for a folder that is not there or holds no checkpoint.
    """
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}; give a run folder or a checkpoint in it")
    if (path / COMPLETE).is_file() or checkpoint.STEP_NAME.fullmatch(path.name):
        folders = [path]
    else:
        found = checkpoint.step_folders(_checkpoints_of(path))
        folders = sorted(folder for folder, _, suffix in found if not suffix.endswith(".tmp"))
    if not folders:
        raise UsageError(f"{path} has no checkpoint; give a run folder or a checkpoint in it")
    for folder in folders:
        try:
            yield folder, checkpoint.damages(folder)
        except UnreadableError as error:
            yield folder, [str(error)]


# Diff


def diff(first: Path, second: Path) -> Iterator[str]:
    """A line for each setting, shape and tensor that differs. Raises UsageError for a checkpoint that is not sound."""
    folders = [checkpoint.resolve(path) for path in (first, second)]
    for folder in folders:
        if (damage := checkpoint.damage_of(folder)) is not None:
            raise UsageError(f"{folder} is damaged: {damage}; compare sound checkpoints")
    for name in ("config.yaml", "model.yaml"):
        old, new = (_section(folder, name) for folder in folders)
        yield from (f"{name}  {line}" for line in compare_config(old, new))
    for part in (MODEL, OPTIMIZER):
        yield from _diff_tensors(*(CheckpointTensors(folder, part) for folder in folders))


def _diff_tensors(first: CheckpointTensors, second: CheckpointTensors) -> Iterator[str]:
    names = [set(source.names()) for source in (first, second)]
    for name in sorted(names[0] | names[1]):
        if name not in names[1]:
            yield f"{name}  is in {first.folder} alone"
        elif name not in names[0]:
            yield f"{name}  is in {second.folder} alone"
        elif (shape := first.shape(name)) != (other := second.shape(name)):
            yield f"{name}  {list(shape)} -> {list(other)}"
        elif (largest := _largest_difference(name, first, second)) is not None:
            dtypes = [str(source.dtype(name)).removeprefix("torch.") for source in (first, second)]
            changed = "" if dtypes[0] == dtypes[1] else f"{dtypes[0]} -> {dtypes[1]}, "
            yield f"{name}  {changed}largest difference {largest:.3g}"


def _largest_difference(name: str, first: CheckpointTensors, second: CheckpointTensors) -> float | None:
    """The largest difference of two values, NaN where one is not finite; None if all bits are equal."""
    alike, largest = first.dtype(name) == second.dtype(name), 0.0
    for start, stop in pieces_of(first.shape(name)):
        old, new = first.rows(name, start, stop), second.rows(name, start, stop)
        if not alike or as_bytes(old) != as_bytes(new):
            alike = False
            found = float((old.to(torch.float64) - new.to(torch.float64)).abs().max()) if old.numel() else 0.0
            largest = found if math.isnan(found) else max(largest, found) if not math.isnan(largest) else largest
    return None if alike else largest


def _section(folder: Path, name: str) -> dict[str, Any]:
    return checkpoint.read_section(folder, name) if name in checkpoint.entries(folder) else {}


# Prune


def prune(run: Path, keep: int, dry_run: bool) -> Iterator[str]:
    """Delete a run's checkpoints but those that `retain.kept` names; a line for each that goes.

    Damaged and unfinished ones go too. Raises MoeLmError, before anything is deleted, if the run is training or one
    that would stay is damaged.
    """
    checkpoints = _checkpoints_of(run)
    with RunFolder(run):
        kept = retain.kept(checkpoints, keep)
        for folder in sorted(kept):
            if (damage := checkpoint.damage_of(folder)) is not None:
                raise MoeLmError(f"nothing is deleted, because {folder}, which would stay, is damaged: {damage}")
        for folder, _, _ in sorted(checkpoint.step_folders(checkpoints)):
            if folder not in kept:
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                if not dry_run:
                    checkpoint.delete(folder)
                    if folder.exists():
                        raise MoeLmError(f"{folder} cannot be deleted; look at the permissions of its folder")
                yield f"{'would delete' if dry_run else 'deleted'} {folder}, {size / 1e6:,.1f} MB"


def _checkpoints_of(run: Path) -> Path:
    if not (run / "checkpoints").is_dir():
        raise UsageError(f"{run} is not a run folder: it has no folder checkpoints; give the folder of a run")
    return run / "checkpoints"
