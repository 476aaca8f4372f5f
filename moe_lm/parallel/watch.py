"""What ranks do about each other: agree before they begin, notice a standstill, and say who was lost."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import moe_lm
from moe_lm.common.errors import UsageError
from moe_lm.common.process import end_with_parent
from moe_lm.parallel.meeting import why_lost
from moe_lm.parallel.topology import Topology

# What the back ends say when another rank has gone, or has not answered in time.
LOST = ("Connection closed by peer", "Connection reset", "Timed out waiting", "Broken pipe", "NCCL", "Socket Timeout")


def end_with_launcher() -> None:
    """`end_with_parent` where that is torchrun's agent or DeepSpeed's launcher; a shell may go and leave a rank behind.

    They end their ranks unless they are killed themselves. A rank that outlives them would hold its device and the run
    folder, and the ranks on other hosts would wait for it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:
        end_with_parent()


def agree(topology: Topology, what: Mapping[str, object]) -> None:
    """Raise UsageError on every rank when `what`, the code or torch is another one on some rank."""
    if topology.world_size == 1:
        return
    mine = {name: str(value) for name, value in what.items()}
    mine |= {"moe_lm's code": _code(), "torch": torch.__version__}
    everyone: list[tuple[str, dict[str, str]] | None] = [None] * topology.world_size
    dist.all_gather_object(everyone, (socket.gethostname(), mine))
    hosts_and_values = [entry for entry in everyone if entry is not None]
    host_0, first = hosts_and_values[0]
    for rank, (host, values) in enumerate(hosts_and_values):
        for name in [*first, *values]:
            if first.get(name) != values.get(name):
                raise UsageError(
                    f"rank {rank} on {host} has {name}={values.get(name)}, rank 0 on {host_0} has {first.get(name)}; "
                    "start every rank with the same config, code and versions",
                    common=True,
                )


class Watchdog:
    """Ends the process, with the stack of each of its threads on stderr, when nothing fed it for `seconds`.

    Without it a rank waits for one that hangs until the back end's own patience ends, and nobody sees where. A process
    that is alone waits for nobody: with None it does nothing.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def feed(self) -> None:
        if self._seconds is not None:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=2)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While something is written, which may take as long as it needs."""
        self.stop()
        yield
        self.feed()


NO_WATCHDOG = Watchdog(None)


@contextmanager
def losses_are_said(topology: Topology) -> Iterator[None]:
    """Turn the back end's error about a rank that has gone into one sentence (MoeLmError), on every rank the same."""
    try:
        yield
    except RuntimeError as error:
        if topology.world_size == 1 or not any(text in str(error) for text in LOST):
            raise
        raise why_lost() from error


def _code() -> str:
    """Version and hash of the source that runs here."""
    digest = hashlib.sha256()
    for file in sorted(Path(moe_lm.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return f"{moe_lm.__version__} ({digest.hexdigest()[:12]})"
