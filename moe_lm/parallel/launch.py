"""Being one of the ranks that a launcher (launch/) started. Imports torch only if there are several."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moe_lm.common.exits import LAUNCHER
from moe_lm.common.process import end_with_parent
from moe_lm.common.verbs import LOCAL_RANK
from moe_lm.parallel.topology import current_topology

if TYPE_CHECKING:
    from moe_lm.parallel.meeting import Meeting

STOP = "stop-"  # begins the name of the file in the launcher's folder that stops the ranks; the signal's number follows
BEGUN = "begun"  # the file with the step after which they go on
STOP_POLL_SECONDS = 0.2


def launched_ranks() -> Meeting | None:
    """The ranks that a launcher started together with this process; None if it is alone.

    Raises UsageError if the launcher's environment is incomplete.
    """
    topology = current_topology()
    if topology.world_size == 1:
        return None
    from moe_lm.parallel.meeting import Meeting

    return Meeting(topology)


def without_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without `--local_rank=N`, which DeepSpeed's launcher adds; N goes into the environment."""
    kept, rest = [], iter(arguments)
    for item in rest:
        name, _, value = item.partition("=")
        if name in LOCAL_RANK:
            number = value or next(rest, "0")
            if "RANK" in os.environ:  # alone it would look like one of many ranks
                os.environ.setdefault("LOCAL_RANK", number)
        else:
            kept.append(item)
    return kept


def heed_launcher() -> None:
    """End when torchrun's agent or DeepSpeed's launcher ends, and stop when launch/torchrun.sh is told to.

    These launchers end their ranks unless they are killed themselves. A rank that outlives them would hold its device
    and the run folder, and the ranks on other hosts would wait for it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:
        end_with_parent()
    if LAUNCHER not in os.environ:
        return
    folder = Path(os.environ[LAUNCHER])
    with suppress(OSError):  # it is on another machine
        (folder / f"rank-{os.getpid()}").touch()
    if "TORCHELASTIC_RUN_ID" in os.environ and folder.is_dir():
        threading.Thread(target=_stop_with_launcher, args=(folder,), daemon=True).start()


def note_start(step: int) -> None:
    """Tell the launcher after which step the ranks go on, so that it counts the restarts without progress."""
    with suppress(OSError):
        (Path(os.environ.get(LAUNCHER, os.devnull)) / BEGUN).write_text(str(step), encoding="utf-8")


def begun_after(folder: Path) -> int:
    """The step after which the ranks have gone on at last; -1 if they have not come so far."""
    with suppress(OSError, ValueError):
        return int((folder / BEGUN).read_text(encoding="utf-8"))
    return -1


def reasons(folder: Path) -> list[int]:
    """The exit codes of ranks that said in the launcher's folder why they must not be started again."""
    return [int(file.name.rpartition("-")[2]) for file in folder.glob("exit-*")]


def _stop_with_launcher(folder: Path) -> None:
    """Wait for the file by which the launcher stops its ranks: a signal would be lost on one that is about to start."""
    while not (files := list(folder.glob(f"{STOP}*"))):
        time.sleep(STOP_POLL_SECONDS)
    os.kill(os.getpid(), int(files[0].name.removeprefix(STOP)))
