"""Which checkpoints stay: the newest good ones, pinned ones and the best; and which give way on a full disk.

A good checkpoint is a complete one that is not doubtful.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import DAMAGED, PINNED, REPLACED
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


class Known(NamedTuple):
    """What decides whether a complete checkpoint stays."""

    is_good: bool
    is_pinned: bool
    held_out_loss: float | None


def best(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the lowest held-out loss, doubtful ones left out; of equal ones the oldest."""
    step = _best_step(_known(checkpoints))
    return None if step is None else checkpoint.complete_checkpoints(checkpoints)[step]


def kept(checkpoints: Path, keep: int, keep_best: bool = True) -> set[Path]:
    """The complete checkpoints that stay, as of `steps_kept`."""
    complete = checkpoint.complete_checkpoints(checkpoints)
    return {complete[step] for step in steps_kept(_known(checkpoints), keep, keep_best)}


def steps_kept(known: Mapping[int, Known], keep: int, keep_best: bool) -> set[int]:
    """The steps whose checkpoints stay: the newest `keep` good ones, pinned ones, the best.

    Doubtful ones do not count, and stay until there is a newer one that does.
    """
    good = sorted(step for step, of in known.items() if of.is_good)
    stay = set(good[-keep:])
    stay |= {step for step in known if not good or step > good[-1]}
    stay |= {step for step, of in known.items() if of.is_pinned}
    lowest = _best_step(known) if keep_best else None
    return stay if lowest is None else stay | {lowest}


def _known(checkpoints: Path) -> dict[int, Known]:
    complete = checkpoint.complete_checkpoints(checkpoints)
    good = checkpoint.good_steps(complete)
    return {
        step: Known(step in good, (folder / PINNED).is_file(), held_out_loss(folder))
        for step, folder in complete.items()
    }


def _best_step(known: Mapping[int, Known]) -> int | None:
    losses = {step: of.held_out_loss for step, of in sorted(known.items()) if of.is_good}
    measured = {step: loss for step, loss in losses.items() if loss is not None}
    return min(measured, key=lambda step: measured[step]) if measured else None


def clean(checkpoints: Path, config: CheckpointConfig, uploading: Path | None = None) -> None:
    """Delete leftovers of unfinished saves, and all complete checkpoints but those `kept` and the one `uploading`.

    What cannot be deleted stays for the next time. A folder under its final name without COMPLETE is not a leftover of
    a save, so it stays too; so does a damaged one that was moved aside.
    """
    complete = checkpoint.complete_checkpoints(checkpoints)
    stay = kept(checkpoints, config.keep, config.best)
    for folder, _, suffix in checkpoint.step_folders(checkpoints):
        if folder not in stay and folder != uploading and suffix != DAMAGED and (suffix or folder in complete.values()):
            checkpoint.delete(folder)


def drop_after(checkpoints: Path, step: int) -> None:
    """Delete the complete checkpoints after `step`, so that a run that was killed goes on from there too."""
    for newer, folder in checkpoint.complete_checkpoints(checkpoints).items():
        if newer > step:
            checkpoint.delete(folder)


def make_room(checkpoints: Path, keep_best: bool) -> Path | None:
    """Delete the checkpoint that is needed least, and return it; None if none may go.

    Leftovers and damaged ones go first, then doubtful ones, then the oldest. The newest good one (if none is good, the
    newest), pinned ones and the best stay.
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
    good = checkpoint.good_steps(complete)
    doubtful = [step for step in sorted(complete) if step not in good]
    lowest = best(checkpoints) if keep_best else None
    for step in [*doubtful, *good][:-1]:
        if complete[step] != lowest and not (complete[step] / PINNED).is_file():
            yield complete[step]


def _loss_in(path: Path, key: str = "validation_loss") -> float | None:
    with suppress(OSError, ValueError, TypeError, AttributeError):
        return loss_of(json.loads(path.read_text(encoding="utf-8")), key)
    return None


def loss_of(values: Mapping[str, Any], key: str = "validation_loss") -> float | None:
    """A loss among the values of `trainer.json` or `held_out.json`; None where there is none."""
    loss = values.get(key)
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None
