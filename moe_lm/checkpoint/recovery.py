"""Going on past damage: the newest sound checkpoint is taken, and the damaged ones after it are moved aside."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import COMPLETE, DAMAGED, DOUBTFUL, REPLACED, UnreadableError
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import OnDamage
from moe_lm.parallel.process_group import Ranks

WHY = "DAMAGED"  # a file in a checkpoint that was moved aside: how it is damaged
KEEP_DAMAGED = 3
RETRIES, RETRY_SECONDS = 3, 2.0  # for a file that cannot be read


class Found(NamedTuple):
    """The checkpoint to go on from, verified, and how each newer one is damaged."""

    folder: Path | None
    damaged: dict[str, str]  # by the name of the folder

    @property
    def lines(self) -> dict[str, str]:
        """What became of each damaged checkpoint, for the user."""
        return {
            name: f"the checkpoint {name} is damaged: {damage}; it is now {name}{DAMAGED}, and training goes on from "
            f"{self.folder and self.folder.name}"
            for name, damage in self.damaged.items()
        }


def newest_sound(
    checkpoints: Path, on_damage: OnDamage = "previous", ranks: Ranks | None = None, good: bool = False
) -> Found:
    """The newest checkpoint that verifies, the same for every rank; every rank calls this and verifies a share.

    Of `good` ones alone if asked; doubtful ones are passed over and stay. Damaged ones after it are moved aside; at
    most KEEP_DAMAGED of them are kept. Raises MoeLmError when a rank does not see what rank 0 sees, when a file still
    cannot be read after RETRIES, when none is sound though there are some, and for `stop` when a newer one is damaged.
    """
    ranks = ranks or Ranks()
    damaged: dict[str, str] = {}
    sound = None
    for name, is_complete in ranks.first(lambda: _newest_first(checkpoints, good), ()):
        damage = _damage_of(checkpoints / name, is_complete, ranks)
        if damage is None:
            sound = checkpoints / name
            break
        damaged[name] = damage
    found = Found(sound, damaged)
    ranks.first(lambda: _settle(checkpoints, found, on_damage, good), (MoeLmError,))
    return found


def _newest_first(checkpoints: Path, good: bool) -> list[tuple[str, bool]]:
    """Every checkpoint under a name that a finished save gave, or that makes room, and whether it has COMPLETE."""
    found = [item for item in checkpoint.step_folders(checkpoints) if item[2] in ("", REPLACED)]
    folders = [folder for folder, _, _ in sorted(found, key=lambda item: (-item[1], item[2]))]
    if good:
        folders = [folder for folder in folders if not (folder / DOUBTFUL).is_file()]
    return [(folder.name, (folder / COMPLETE).is_file()) for folder in folders]


def _damage_of(folder: Path, is_complete: bool, ranks: Ranks) -> str | None:
    """The damage that some rank finds in its share. What rank 0 alone sees is not damage, but a folder not shared."""

    def look() -> str | None:
        if is_complete and not (folder / COMPLETE).is_file():
            raise MoeLmError(
                f"rank {ranks.rank} does not see the checkpoint {folder} that rank 0 goes on from; set run_dir to a "
                "folder that all hosts share"
            )
        share = slice(ranks.rank, None, ranks.size)
        for _ in range(RETRIES):
            with suppress(UnreadableError):
                return checkpoint.damage_of(folder, share=share)
            time.sleep(RETRY_SECONDS)
        return checkpoint.damage_of(folder, share=share)

    return next((found for found in ranks.each(look, (MoeLmError,)) if found is not None), None)


def _settle(checkpoints: Path, found: Found, on_damage: OnDamage, good: bool) -> None:
    if found.folder is None:
        aside = {} if good else {folder.name: why(folder) for _, folder in _moved_aside(checkpoints)}
        if found.damaged or aside:
            kind = "good checkpoint" if good else "checkpoint"
            raise MoeLmError(
                f"no {kind} in {checkpoints} is sound: {_listed(found.damaged | aside)}; bring one back from a copy, "
                "or choose another run_dir to begin anew"
            )
    elif found.damaged and on_damage == "stop":
        raise MoeLmError(
            f"checkpoints in {checkpoints} are damaged: {_listed(found.damaged)}; {found.folder.name} is sound, and "
            "checkpoint.on_damage=previous goes on from it"
        )
    else:
        for name, damage in found.damaged.items():
            _move_aside(checkpoints / name, damage)


def _move_aside(folder: Path, damage: str) -> None:
    aside = folder.with_name(folder.name.removesuffix(REPLACED) + DAMAGED)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
    except OSError as error:
        raise MoeLmError(
            f"the checkpoint {folder} is damaged ({damage}) and cannot be renamed: {checkpoint.reason(error)}; move it "
            "away by hand"
        ) from error
    with suppress(OSError):
        (aside / WHY).write_text(f"{damage}\n", encoding="utf-8")
    for _, other in _moved_aside(folder.parent)[:-KEEP_DAMAGED]:
        checkpoint.delete(other)


def _moved_aside(checkpoints: Path) -> list[tuple[int, Path]]:
    """The damaged checkpoints that were moved aside, with their steps, oldest first."""
    return sorted((step, folder) for folder, step, suffix in checkpoint.step_folders(checkpoints) if suffix == DAMAGED)


def why(folder: Path) -> str:
    """How a checkpoint that was moved aside is damaged."""
    with suppress(OSError, ValueError):
        return (folder / WHY).read_text(encoding="utf-8").strip()
    return "moved aside as damaged"


def _listed(damaged: dict[str, str]) -> str:
    return ", ".join(f"{name} ({damage})" for name, damage in damaged.items())
