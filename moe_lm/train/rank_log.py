"""A log of each rank's own: where it ran, and its error with the traceback that the terminal does not show."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch

import moe_lm
from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.topology import Topology


@contextmanager
def rank_log(topology: Topology, run_dir: Path) -> Iterator[None]:
    """Write `logs/rank-00003.log` in the run folder; a single process needs none. Raises MoeLmError when it cannot."""
    if topology.world_size == 1:
        yield
        return
    path = run_dir / "logs" / f"rank-{topology.rank:05d}.log"
    versions = f"moe_lm {moe_lm.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _say(path, f"started on {socket.gethostname()}, process {os.getpid()}, {topology}, {versions}")
    except OSError as error:
        raise MoeLmError(
            f"cannot write {path}: {error.strerror}; make the run folder writable on every host"
        ) from error
    try:
        yield
    except BaseException:
        _try_to_say(path, traceback.format_exc())
        raise
    _try_to_say(path, "ended")


def _say(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')} {text.rstrip()}\n")


def _try_to_say(path: Path, text: str) -> None:
    """A full disk must not hide the error, nor end a run that went well."""
    try:
        _say(path, text)
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
