"""The ranks of a tool: start them, wait for all, report the one that fails, leave none behind.

Torch's elastic launcher would do the starting, but it keeps its signal handlers, logs every stop and has no timeout.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from moe_lm.common.errors import MoeLmError
from moe_lm.common.signals import after_this

TAIL = 15  # last lines of a log that are shown


def run_ranks(
    worker: str,
    folder: Path,
    world_size: int,
    timeout_seconds: float,
    threads: int | None = None,
    compiling: bool = False,
    advice: str = "allow more with --timeout",
) -> None:
    """Run the module `worker` on this many ranks, with `folder`, where its task is, as its argument.

    Unless it is `compiling`, torch.compile does nothing there. `advice` is for who waited in vain.

    Raises MoeLmError with the last lines of a rank's log when it fails or is not done in time.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS", "1")),
        "PYTHONUNBUFFERED": "1",
    }
    if not compiling:  # importing DeepSpeed imports torch.compile, which takes 5 s a rank
        environment["TORCHDYNAMO_DISABLE"] = "1"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # from a launcher
        environment.pop(name, None)
    if world_size > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world_size)}
    logs = [folder / f"world-{world_size}-rank-{rank}.log" for rank in range(world_size)]
    with ExitStack() as stack:
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_stop, ranks)
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            output = stack.enter_context(log.open("w"))
            with after_this():
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-m", worker, str(folder)],
                        env=environment | own,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + timeout_seconds
        while set(codes := [rank.poll() for rank in ranks]) != {0}:
            failed = [rank for rank, code in enumerate(codes) if code]
            if failed:
                raise MoeLmError(
                    f"rank {failed[0]} of {world_size} failed with exit code {codes[failed[0]]}; its last lines:\n"
                    f"{_tail(logs[failed[0]])}"
                )
            if time.monotonic() > deadline:
                waiting = codes.index(None)
                raise MoeLmError(
                    f"{world_size} processes were not done after {timeout_seconds:g} s; {advice}; "
                    f"the last lines of rank {waiting}:\n{_tail(logs[waiting])}"
                )
            time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.wait()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
