"""DeepSpeed's launcher over pdsh, which stops as a run does.

    python -m moe_lm.parallel.pdsh HOSTFILE OPTIONS --module moe_lm VERB CONFIG

At a signal DeepSpeed's own launcher leaves its ranks behind, which have 30 s, and ends with 1. So it runs in a session
of its own, where no terminal reaches it, and the signal goes to the ranks alone. They end with 0 after saying in a
folder why they must not be started again (common/exits.py); where that folder is not shared, with their own code.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from moe_lm.common.exits import FINISHED, LAUNCHER, STOPPED
from moe_lm.common.process import COMMAND, end_with_parent
from moe_lm.common.signals import NOTHING_TO_SAVE, calling_on_stop
from moe_lm.parallel.launch import reasons

SECONDS_TO_END = 5.0  # for DeepSpeed's launcher, to reach the other hosts


def main() -> None:
    """Run DeepSpeed's launcher, and end with the exit code of the ranks."""
    hostfile, *arguments = sys.argv[1:]
    folder: Path | None = None
    launcher: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop(number: int) -> None:
        nonlocal stopping
        stopping = True
        if folder is None or launcher is None or not signal_ranks(number, hosts_of(Path(hostfile)), folder.name):
            print(NOTHING_TO_SAVE, file=sys.stderr, flush=True)
            leave(STOPPED)

    def leave(code: int) -> NoReturn:
        if launcher is not None and launcher.poll() is None:
            launcher.terminate()  # which ends the ranks
            with suppress(subprocess.TimeoutExpired):
                launcher.wait(SECONDS_TO_END)
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)

    with calling_on_stop(stop, leave):
        folder = Path(tempfile.mkdtemp(prefix=".moe-lm-", dir="."))  # the ranks have the same working directory
        launcher = start(hostfile, arguments, folder)
        code = launcher.wait() % 256 or max(reasons(folder), default=FINISHED)
        if stopping and not list(folder.glob("rank-*")):  # none was ready to hear it
            code = STOPPED
        leave(code)


def start(hostfile: str, arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start DeepSpeed's launcher; `env` carries our variables to the other hosts."""
    split = arguments.index("--module")
    told = (f"{LAUNCHER}={folder.absolute()}", f"{COMMAND}={os.environ[COMMAND]}")
    return subprocess.Popen(
        [
            # --force_multi: a hostfile with one host means that host, not this one.
            *("deepspeed", "--log_level", "warning", "--force_multi", "--hostfile", hostfile, *arguments[:split]),
            # --no_local_rank: the rank is in the environment.
            *("--no_local_rank", "--no_python", "env", *told, sys.executable, "-u", "-m", *arguments[split + 1 :]),
        ],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(signal.SIGTERM),
    )


def hosts_of(hostfile: Path) -> list[str]:
    lines = [line.split("#")[0].split() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    return [words[0] for words in lines if words]


def signal_ranks(number: int, hosts: list[str], token: str) -> int:
    """Send a signal to the ranks on all hosts: the children of the launchers whose command line has the `token`.

    Returns how many there are.
    """
    launchers = f"^[^ ]*python[^ ]* -u -m deepspeed.launcher.launch .*{token}"
    command = f'pkill -{number} --count --parent "$(pgrep --delimiter , --full {shlex.quote(launchers)})"'
    over_ssh = os.environ | {"PDSH_RCMD_TYPE": "ssh"}
    done = subprocess.run(["pdsh", "-N", "-w", ",".join(hosts), command], capture_output=True, text=True, env=over_ssh)
    return sum(int(line) for line in done.stdout.split() if line.isdecimal())


if __name__ == "__main__":
    main()
