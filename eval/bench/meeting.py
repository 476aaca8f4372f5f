r"""The meeting of many ranks on one machine: how long it takes, what rank 0 keeps open, and what is said when it fails.

    TORCH_GLOO_LAZY_INIT=1 TORCH_CPP_LOG_LEVEL=ERROR unshare --net sh -c 'ip link set lo up; exec \
        python eval/bench/meeting.py --ranks 8 64 512 --gloo [--output eval/results/meeting.json]'

A network of its own, because torch asks for the name behind each connection: a name server that does not answer costs
5 s each time.

The ranks are light: forks of one process that has imported torch, without a model, each with 4 MB of its own. They meet
and agree as those of a run do; with `--gloo` they also form the process group and add up a number. Then they part, one
of them has another setting, or one is killed and the others find out as in training: whoever waits for it asks why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from moe_lm.common.errors import MoeLmError
from moe_lm.parallel.heartbeat import wait_until
from moe_lm.parallel.meeting import Meeting
from moe_lm.parallel.topology import Topology
from moe_lm.parallel.watch import agree

SECONDS = 300.0
SETTINGS = {f"train.setting_{number}": "a value of some length" for number in range(150)}  # as many as a run has
HOSTS_OF = 8  # ranks on one host, as far as they tell each other

Ending = Literal["part", "differ", "die"]


class Outcome(NamedTuple):
    """What became of the ranks: exit codes by rank, all that they said, and rank 0's figures."""

    codes: list[int]
    said: str
    figures: dict[str, float]


def run(ranks: int, ending: Ending, gloo: bool = False) -> Outcome:
    """Fork the ranks, and wait until all have ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        with (folder / "said").open("w") as said:
            processes = [_fork(rank, ranks, ending, gloo, folder, said.fileno(), started) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        figures = json.loads((folder / "figures").read_text()) if (folder / "figures").exists() else {}
        figures["seconds until all have ended"] = time.perf_counter() - started
        return Outcome(codes, (folder / "said").read_text(), figures)


def _fork(rank: int, ranks: int, ending: Ending, gloo: bool, folder: Path, said: int, started: float) -> int:
    process = os.fork()
    if process:
        return process
    code = 70  # what no rank ends with
    try:
        os.dup2(said, 2)
        sys.stderr = os.fdopen(2, "w")
        _be_a_rank(rank, ranks, ending, gloo, folder, started)
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:  # in a process that must not go on as its parent would
        print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def _be_a_rank(rank: int, ranks: int, ending: Ending, gloo: bool, folder: Path, started: float) -> NoReturn:
    socket.gethostname = lambda: f"host-{rank // HOSTS_OF:03}"
    meeting = Meeting(Topology(rank, ranks, rank % HOSTS_OF))
    last = ranks - 1
    figures: dict[str, float] = {}

    def note(what: str) -> None:
        figures[f"seconds until {what}"] = time.perf_counter() - started
        figures[f"files of rank 0 when {what}"] = len(os.listdir("/proc/self/fd"))

    try:
        with meeting.lost_ranks_named():
            notes = meeting.assemble(SECONDS)
            note("all have met")
            other = {"train.setting_7": "another"} if ending == "differ" and rank == last else {}
            agree(meeting, SETTINGS | other)
            note("all agree")
            if gloo:
                store = dist.PrefixStore("group", notes)
                dist.init_process_group(
                    "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS)
                )
                one = torch.ones(1)
                dist.all_reduce(one)
                assert int(one) == ranks
                note("gloo has added up")
            if rank == 0:
                (folder / "figures").write_text(json.dumps(figures))
            if ending == "die":
                _lose(meeting, rank, last)
    except MoeLmError as error:
        meeting.fail(f"error: {error}", error.exit_code, error.common)
        sys.exit(error.exit_code)
    notes.add("done", 1)
    if rank == 0:  # which keeps the notes
        wait_until(lambda: notes.add("done", 0) == ranks, SECONDS)
    assert meeting.heartbeat is not None
    meeting.heartbeat.stop()
    sys.exit(0)


def _lose(meeting: Meeting, rank: int, last: int) -> None:
    """The last rank is killed. The one before it waits for a sum with it, and the others in turn for that one."""
    if rank == last:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    raise dist.DistError("Connection closed by peer")  # as gloo says it, on every rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--gloo", action="store_true", help="form the process group too")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    endings: tuple[Ending, ...] = ("part", "differ", "die")
    result: dict[str, object] = {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
    for ranks in arguments.ranks:
        for ending in endings:
            outcome = run(ranks, ending, arguments.gloo and ending == "part")
            rounded = {name: round(figure, 2) for name, figure in outcome.figures.items()}
            codes = {str(code): outcome.codes.count(code) for code in sorted(set(outcome.codes))}
            result[f"{ranks} ranks, {ending}"] = rounded | {"codes": codes, "said": outcome.said.splitlines()}
            print(f"{ranks} ranks, {ending}:", json.dumps(result[f"{ranks} ranks, {ending}"], indent=2), flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
