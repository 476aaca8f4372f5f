"""How ranks meet, agree, and what becomes of them when one is lost, hangs or is slow (FAULTS rows 15 to 17)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.parallel.topology import Topology, current_topology
from tests.processes import (
    Start,
    events,
    finish,
    free_port,
    losses,
    rank_environment,
    runs,
    start_program,
    start_ranks,
    wait_until,
)

SETTINGS = (
    "train.steps=100000", "parallel.timeout_seconds=8", "checkpoint.every=5", "train.micro_batch_size=2",
    "data.verify=true",
)  # fmt: skip


def start_training(
    start: Start, world_size: int, config: Path, folder: Path, *settings: str
) -> list[subprocess.Popen[str]]:
    """The ranks of a run without end, in training."""
    ranks = start_ranks(start, world_size, "pretrain", config, f"run_dir={folder / 'run'}", *SETTINGS, *settings)
    saved = (folder / "run").glob
    wait_until(lambda: list(saved("checkpoints/step-*/COMPLETE")) or not runs(ranks[0]), "a checkpoint", seconds=90)
    return ranks


@pytest.mark.parametrize("killed", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_others_stop_when_a_rank_is_killed_and_one_names_it(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, killed: int
) -> None:
    ranks = start_training(start_moe_lm, 3, tiny_pretrain, tmp_path, "train.global_batch_size=6")
    ranks[killed].kill()
    errors = [rank.communicate(timeout=40)[1] for rank in ranks]
    assert [rank.returncode for number, rank in enumerate(ranks) if number != killed] == [1, 1]
    (said,) = "".join(errors).splitlines()
    assert f"lost rank {killed} on {socket.gethostname()}, which has ended or does not answer" in said
    assert "run the same command again" in said
    logs = [(tmp_path / "run" / "logs" / f"rank-0000{rank}.log").read_text(encoding="utf-8") for rank in range(3)]
    for number, (rank, log) in enumerate(zip(ranks, logs, strict=True)):
        assert f"process {rank.pid}" in log
        assert ("Traceback" in log) == (number != killed)


def test_what_one_rank_alone_finds_wrong_before_the_ranks_meet_is_said_by_it(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start
) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").touch()
    port = free_port()
    ranks = [
        start_moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / str(rank)}", **rank_environment(rank, 2, port))
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    (said,) = "".join(errors).splitlines()
    assert f"rank 1 on {socket.gethostname()}: error: run_dir={tmp_path / '1'} holds config.json" in said


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped_is_named_and_not_waited_for(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, stopped: int
) -> None:
    """The others end with their stacks, which tell where they waited. Rank 0 keeps the notes by which ranks agree."""
    ranks = start_training(start_moe_lm, 2, tiny_pretrain, tmp_path)
    os.kill(ranks[stopped].pid, signal.SIGSTOP)
    other = ranks[1 - stopped]
    _, err = other.communicate(timeout=60)
    assert other.returncode == 1
    *stacks, said = err.splitlines()
    host = socket.gethostname()
    if stopped == 1:
        assert re.match(f"error: rank 1 on {host} has not moved for 8 s \\(last: [a-z0-9, ]+\\)", said)
    else:
        assert f"error: rank 0 on {host} has not answered for 8 s (here: step" in said
    assert "run the same command again" in said
    assert stacks[0].startswith(f"rank {1 - stopped} on {host} has been at the same place for ")
    log = (tmp_path / "run" / "logs" / f"rank-0000{1 - stopped}.log").read_text(encoding="utf-8")
    for shown in ("\n".join(stacks), log):
        assert "in train_and_log" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "last"),
    [
        ("forward", "5 s \\(last: step 5, forward"),
        ("save", "50 s \\(last: step 5, saving"),
        ("stopped save", "5 s \\(last: "),  # a second before, or more on a busy machine
    ],
)
def test_a_rank_that_stands_still_is_named_with_the_place(
    tiny_pretrain: Path, tmp_path: Path, where: str, last: str
) -> None:
    """Rank 1 of 3 waits for nothing, in a process that lives; or it is stopped in a save."""
    program = Path(__file__).parent / "standing_still.py"
    settings = (*SETTINGS, "train.global_batch_size=6", "parallel.timeout_seconds=5")
    ranks = start_program(3, program, where, "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings)
    living = ranks if where != "stopped save" else [ranks[0], ranks[2]]
    outputs = [rank.communicate(timeout=150)[1] for rank in living]
    ranks[1].kill()
    said = [line for output in outputs for line in output.splitlines() if "has not moved for" in line]
    assert len(said) == 1
    assert re.search(f"rank 1 on {socket.gethostname()} has not moved for {last}", said[0])
    assert all("most recent call first" in output for output in outputs)
    assert [rank.returncode for rank in living] == [1] * len(living)


@pytest.mark.slow
def test_a_save_may_take_longer_than_ranks_wait_for_each_other(tiny_pretrain: Path, tmp_path: Path) -> None:
    program = Path(__file__).parent / "standing_still.py"
    settings = ("train.steps=4", "checkpoint.every=2", "parallel.timeout_seconds=3", "train.eval_every=0")
    finish(start_program(2, program, "slow save", "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings))
    assert (tmp_path / "checkpoints" / "step-00000004" / "COMPLETE").is_file()


@pytest.mark.alone
@pytest.mark.parametrize(
    ("layout", "milliseconds"),
    [
        ((), 12),
        pytest.param(("parallel.engine=deepspeed", "parallel.expert_parallel_size=2"), 12, marks=pytest.mark.slow),
        pytest.param((), 200, marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named_within_20_steps(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, layout: tuple[str, ...], milliseconds: int
) -> None:
    """Rank 1 is stopped three quarters of the time, as where something else uses its processor."""
    ranks = start_ranks(start_moe_lm, 2, "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SETTINGS, *layout)

    def steps() -> int:
        return len(losses(tmp_path)) if runs(ranks[0]) else 0

    def named() -> bool:
        return any(event["rank"] == 1 for event in events(tmp_path, "slow_rank"))

    wait_until(lambda: steps() >= 5, "five steps", seconds=90)
    begun = steps()
    while not named():
        assert steps() <= begun + 21
        os.kill(ranks[1].pid, signal.SIGSTOP)
        time.sleep(milliseconds / 1000)
        os.kill(ranks[1].pid, signal.SIGCONT)
        time.sleep(milliseconds / 3000)
    assert f"rank 1 on {socket.gethostname()} keeps the others waiting" in (tmp_path / "train.log").read_text("utf-8")


def test_ranks_with_other_settings_are_refused(tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start) -> None:
    port = free_port()
    ranks = [
        start_moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *extra, **rank_environment(rank, 2, port))
        for rank, extra in enumerate(((), ("train.optimizer.lr=0.5",)))
    ]
    errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "rank 1 on" in errors[0]
    assert "has train.optimizer.lr=0.5, rank 0 on" in errors[0]
    assert errors[1] == ""


def test_a_rank_that_does_not_reach_the_others_says_where(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start
) -> None:
    port = free_port()
    settings = (f"run_dir={tmp_path}", "parallel.timeout_seconds=3")
    rank = start_moe_lm("pretrain", tiny_pretrain, *settings, **rank_environment(1, 2, port))
    _, err = rank.communicate(timeout=60)
    assert rank.returncode == 1
    assert f"cannot reach rank 0 of 2 at 127.0.0.1:{port} within 3 s (Connection refused)" in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_half_an_environment_is_refused(tiny_pretrain: Path, start_moe_lm: Start) -> None:
    rank = start_moe_lm("pretrain", tiny_pretrain, WORLD_SIZE=4)
    _, err = rank.communicate(timeout=60)
    assert rank.returncode == 2
    assert "WORLD_SIZE=4, but RANK and MASTER_ADDR and MASTER_PORT are not in the environment" in err


SLURM = {"STEP_ID": "0", "PROCID": "3", "NTASKS": "4", "LOCALID": "1", "JOB_ID": "71234", "STEP_NODELIST": "n[07-08]"}
OPEN_MPI = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    "variables",
    [
        {f"SLURM_{name}": value for name, value in SLURM.items()},
        {f"OMPI_COMM_WORLD_{name}": value for name, value in OPEN_MPI.items()}
        | {"MASTER_ADDR": "n07", "MASTER_PORT": "21234"},
    ],
)
def test_ranks_of_srun_and_mpirun(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(variables))
    assert current_topology() == Topology(rank=3, world_size=4, local_rank=1)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("n07", "21234")


def test_a_rank_without_a_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"RANK": "2"})
    with pytest.raises(UsageError, match="RANK=2, but WORLD_SIZE is not in the environment"):
        current_topology()


@pytest.mark.parametrize("argument", [["--local_rank=0"], ["--local-rank", "0"]])
def test_what_deepspeeds_launcher_adds_is_tolerated(
    moe_lm: Callable[..., Any], tiny_pretrain: Path, argument: list[str]
) -> None:
    assert moe_lm("pretrain", tiny_pretrain, "--dry-run", *argument).code == 0
