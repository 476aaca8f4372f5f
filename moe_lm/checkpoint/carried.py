"""Tensors that go along with a model without being part of it, like those for multi-token prediction.

They came with an imported model and lie in `carried/` of its checkpoint, as safetensors. Nothing that trains or samples
reads them. Every checkpoint of a run that trains all weights on has them again, and an export writes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moe_lm.checkpoint import checkpoint
from moe_lm.checkpoint.checkpoint import CARRIED


def is_carrying(folder: Path) -> bool:
    """Whether a checkpoint has such tensors."""
    return any(name.startswith(f"{CARRIED}/") for name in checkpoint.entries(folder))


def carry_on(start: Path, checkpoints: Path) -> Callable[[Path], None]:
    """A function that puts what the checkpoint `start` carries where the next one of a run shall have it.

    `start` may be an earlier checkpoint of the run, which is deleted in time: then the newest one has the same.
    """

    def put(path: Path) -> None:
        newest = checkpoint.latest(checkpoints) or start
        shutil.copytree(newest / CARRIED, path, copy_function=_link_or_copy)

    return put


def _link_or_copy(source: str, target: str) -> None:
    """One file for all checkpoints on a disk: it is never written again."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
