"""Checks between ranks: that they agree before they begin, and that none stands still."""

from __future__ import annotations

import faulthandler
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import moe_lm
from moe_lm.common.errors import UsageError
from moe_lm.parallel.topology import Topology


def agree(topology: Topology, values: Mapping[str, object]) -> None:
    """Raise UsageError on every rank if one of the `values`, the code or torch differs on some rank."""
    if topology.world_size == 1:
        return
    mine = {name: str(value) for name, value in values.items()}
    mine |= {"moe_lm's code": _code(), "torch": torch.__version__}
    everyone: list[dict[str, str]] = [{}] * topology.world_size
    dist.all_gather_object(everyone, mine)
    first = everyone[0]
    for rank, theirs in enumerate(everyone):
        for name in [*first, *theirs]:
            if first.get(name) != theirs.get(name):
                raise UsageError(
                    f"{topology.named([rank])} has {name}={theirs.get(name)}, {topology.named([0])} has "
                    f"{first.get(name)}; start every rank with the same config, code and versions",
                    common=True,
                )


class Watchdog:
    """Ends the process, with the stack of each thread on stderr, when it has not been fed for `seconds`.

    Without it a rank would wait for a hanging one until the back end gives up, and nobody would see where. A single
    process waits for no other: with None the watchdog does nothing.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def feed(self) -> None:
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Not watching, while something is written that may take any time."""
        self.stop()
        yield
        self.feed()


NO_WATCHDOG = Watchdog(None)


def _code() -> str:
    """Version and hash of the source that runs here."""
    digest = hashlib.sha256()
    for file in sorted(Path(moe_lm.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{moe_lm.__version__} ({digest.hexdigest()[:12]})"
