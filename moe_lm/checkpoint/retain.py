"""The held-out loss of checkpoints: the best is kept beyond the newest, and gives way last when the disk is full."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import PINNED, REPLACED
from moe_lm.common.files import whole_file
from moe_lm.config.run import CheckpointConfig

HELD_OUT = "held_out.json"  # what was measured after the checkpoint was saved, so that its manifest does not know it
TRAINER = "trainer.json"


def note_held_out_loss(folder: Path, loss: float) -> None:
    """Keep the loss beside a checkpoint that is there already; a full disk loses it, and the run measures it again."""
    with suppress(OSError), whole_file(folder / HELD_OUT) as file:
        file.write_text(json.dumps({"validation_loss": loss if math.isfinite(loss) else None}), encoding="utf-8")


def noted(folder: Path) -> float | None:
    """The held-out loss that was noted after a checkpoint was saved."""
    return _loss_in(folder / HELD_OUT)


def held_out_loss(folder: Path) -> float | None:
    """The held-out loss at the step of a checkpoint; None if none was measured there."""
    loss = _loss_in(folder / TRAINER)
    return noted(folder) if loss is None else loss


def training_loss(folder: Path) -> float | None:
    """The loss of the last step before a checkpoint."""
    return _loss_in(folder / TRAINER, "loss")


def best(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the lowest held-out loss, doubtful ones left out; of equal ones the oldest."""
    complete = checkpoint.complete_checkpoints(checkpoints)
    losses = {step: held_out_loss(complete[step]) for step in checkpoint.good_steps(complete)}
    known = {step: loss for step, loss in losses.items() if loss is not None}
    return complete[min(known, key=lambda step: known[step])] if known else None


def clean(checkpoints: Path, config: CheckpointConfig) -> None:
    """Delete what is not to be kept."""
    checkpoint.clean(checkpoints, config.keep, best(checkpoints) if config.best else None)


def make_room(checkpoints: Path, keep_best: bool) -> Path | None:
    """Delete the checkpoint that is needed least, and return it; None if none may go.

    Leftovers and damaged ones go first, then the oldest; the newest, pinned ones and the best stay.
    """
    for folder in _needed_least_first(checkpoints, keep_best):
        checkpoint.delete(folder)
        if not folder.exists():
            return folder
    return None


def _needed_least_first(checkpoints: Path, keep_best: bool) -> Iterator[Path]:
    complete = checkpoint.complete_checkpoints(checkpoints)
    for folder, _, suffix in sorted(checkpoint.step_folders(checkpoints)):
        if suffix and not (suffix == REPLACED and folder in complete.values()):
            yield folder
    kept = {best(checkpoints)} if keep_best else set()
    for step in sorted(complete)[:-1]:
        if complete[step] not in kept and not (complete[step] / PINNED).is_file():
            yield complete[step]


def _loss_in(path: Path, key: str = "validation_loss") -> float | None:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        loss = json.loads(path.read_text(encoding="utf-8")).get(key)
        return float(loss) if loss is not None and math.isfinite(loss) else None
    return None
