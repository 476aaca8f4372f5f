"""torchrun, which stops as a run does: `python -m moe_lm.parallel.torchrun OPTIONS --module moe_lm VERB CONFIG`.

`launch/torchrun.sh` runs it, and `--gpus` of the verbs that train.

Torch's agent takes a signal for its own failure: it ends in a traceback, and 1, even if every rank saved and ended
well. So the signals are kept from it. The ranks learn of them from a file, and in files they say why they must not be
started again (common/exits.py).
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from moe_lm.common.environment import AGENT_VARIABLES, Machine, put
from moe_lm.common.exits import FAILED, FINISHED, LAUNCHER, STOPPED
from moe_lm.common.process import COMMAND, cores, open_files, this_command
from moe_lm.common.signals import NOTHING_TO_SAVE, calling_on_stop
from moe_lm.parallel.launch import STOP, begun_after, reasons

SECONDS_TO_APPEAR = 1.0  # for a rank that has been started, to say so


def replace_this_process(processes: int, command: list[str]) -> NoReturn:
    """Become torchrun with this many ranks of `moe-lm COMMAND` on this machine, as launch/torchrun.sh starts it."""
    options = ["--nproc-per-node", str(processes), "--max-restarts", "3", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", "localhost:0", "--module", "moe_lm", *command]
    environment = {**os.environ, COMMAND: this_command()}
    for output in (sys.stdout, sys.stderr):
        output.flush()
    os.execve(sys.executable, [sys.executable, "-m", "moe_lm.parallel.torchrun", *options], environment)


def main() -> None:
    """Run torch's agent, and end with the exit code of the ranks."""
    folder: Path | None = None

    def stop(number: int) -> None:
        if folder is not None:
            try:
                (folder / f"{STOP}{number}").touch()
            except OSError as error:
                print(f"torchrun: cannot tell the ranks to stop: {error}; a second signal ends them", file=sys.stderr)
            time.sleep(SECONDS_TO_APPEAR)
        if folder is None or not any(map(runs, folder.glob("rank-*"))):  # importing torch, or waiting for machines
            print(NOTHING_TO_SAVE, file=sys.stderr, flush=True)
            leave(STOPPED)

    def leave(code: int) -> NoReturn:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)

    with calling_on_stop(stop, leave):
        folder = Path(tempfile.mkdtemp(prefix="moe-lm-"))
        os.environ[LAUNCHER] = str(folder)
        leave(run_agent(sys.argv[1:]) or max(reasons(folder), default=FINISHED))


def run_agent(arguments: list[str]) -> int:
    """Run torch's agent until its ranks have ended well, or have failed more often than it may start them again."""
    from torch.distributed.elastic.agent.server import RunResult, WorkerGroup, WorkerState
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher import api
    from torch.distributed.run import determine_local_world_size, parse_args, run

    class Agent(api.LocalElasticAgent):
        """Counts the restarts since a later step was reached: a run of weeks fails more often than it may in a row."""

        _last = -1

        def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
            result = super()._monitor_workers(worker_group)
            if result.state in (WorkerState.UNHEALTHY, WorkerState.FAILED):
                step = begun_after(Path(os.environ[LAUNCHER]))
                if step > self._last:
                    self._remaining_restarts, self._last = worker_group.spec.max_restarts, step
            return result

    api.LocalElasticAgent = Agent  # type: ignore[misc]
    # The agent wants one signal at least: at this one, from Ctrl-\\, it ends the ranks, and itself in a traceback.
    options = parse_args(["--signals-to-handle", "SIGQUIT", *arguments])
    put(AGENT_VARIABLES, Machine(cores(), determine_local_world_size(options.nproc_per_node)))
    open_files()  # it keeps the store that all ranks speak to
    try:
        run(options)
    except ChildFailedError as error:  # the ranks have said why
        rank, failure = error.get_first_failure()
        print(f"torchrun: rank {rank} failed (exitcode: {failure.exitcode}), and no restart is left", file=sys.stderr)
        return FAILED
    except RendezvousError as error:
        where = f"{options.nnodes} machines at {options.rdzv_endpoint}"
        print(f"torchrun: the meeting of {where} failed: {error or type(error).__name__}", file=sys.stderr)
        return FAILED
    return FINISHED


def runs(rank: Path) -> bool:
    """Whether the process that left this file still runs."""
    with suppress(ProcessLookupError):
        os.kill(int(rank.name.removeprefix("rank-")), 0)
        return True
    return False


if __name__ == "__main__":
    main()
