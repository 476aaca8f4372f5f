"""Ranks that die, hang, are slow, or have no tokens (rows 15 to 17, 19, 23)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.faults.conftest import SHORT, Program, done, events, losses_of, start_ranks, steps
from tests.faults.nursery import Started
from tests.processes import ENVIRONMENT, ROOT, layout, wait_until

pytestmark = pytest.mark.slow  # tests/distributed tries shorter ones in every CI

ENDLESS = (*SHORT, "train.steps=100000", "parallel.timeout_seconds=8", "train.micro_batch_size=2")


def training(program: Program, world_size: int, *arguments: object, **more: object) -> list[Started]:
    """The ranks of a run that has made five steps."""
    run_dir = Path(next(str(word) for word in arguments if str(word).startswith("run_dir=")).removeprefix("run_dir="))
    ranks = start_ranks(program, world_size, "pretrain", *arguments, **more)
    wait_until(lambda: len(steps(run_dir)) >= 5 or ranks[0].poll() is not None, "five steps", lambda: ranks[0].err)
    return ranks


@pytest.mark.row(15)
@pytest.mark.parametrize(
    "killed", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)]
)
def test_the_dead_rank_is_named_and_no_other(
    tiny_pretrain: Path, tmp_path: Path, program: Program, killed: int
) -> None:
    ranks = training(program, 4, tiny_pretrain, f"run_dir={tmp_path}", *ENDLESS, "checkpoint.every=2")
    ranks[killed].kill()
    for number, rank in enumerate(ranks):
        assert rank.wait(timeout=30) == (-signal.SIGKILL if number == killed else 1)
    said = "".join(rank.err for rank in ranks)
    assert f"lost rank {killed} on {socket.gethostname()}" in said
    assert not [n for n in range(4) if n != killed and (f"lost rank {n} " in said or f"and {n} on" in said)]
    assert "Traceback" not in said


@pytest.mark.row(15)
@pytest.mark.slow
def test_a_launcher_starts_the_others_again_and_training_goes_on_by_itself(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    run_dir = tmp_path / "run"
    settings = (*SHORT, "checkpoint.every=5", "train.steps=120", "parallel.timeout_seconds=8")
    done(program("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'alone'}", *settings))
    launcher = subprocess.Popen(
        ["bash", "launch/torchrun.sh", "pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *settings],
        cwd=ROOT, env=os.environ | ENVIRONMENT | {"GPUS_PER_NODE": "2", "NPROC_PER_NODE": "2"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: len(steps(run_dir)) >= 10 or launcher.poll() is not None, "steps")
    children = subprocess.run(["pgrep", "-P", str(launcher.pid), "-f", "run_dir"], capture_output=True, text=True)
    agents = [int(word) for word in children.stdout.split()] or [launcher.pid]
    ranks = subprocess.run(["pgrep", "-P", str(agents[0])], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    output, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output
    assert losses_of(run_dir) == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-5)


@pytest.mark.row(16)
@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_hanging_rank_is_named_and_the_others_show_their_stacks(
    tiny_pretrain: Path, tmp_path: Path, program: Program, stopped: int
) -> None:
    settings = (*ENDLESS, "checkpoint.every=0", "parallel.timeout_seconds=5")
    ranks = training(program, 2, tiny_pretrain, f"run_dir={tmp_path}", *settings)
    ranks[stopped].send_signal(signal.SIGSTOP)
    other = ranks[1 - stopped]
    assert other.wait(timeout=40) == 1
    assert "in train_step" in other.err or "in any_rank" in other.err
    if stopped:
        assert f"rank {stopped} on {socket.gethostname()}" in other.err


@pytest.mark.row(16)
@pytest.mark.slow
def test_a_rank_that_hangs_inside_a_save_is_not_waited_for(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    settings = (*ENDLESS, "checkpoint.every=1", "parallel.timeout_seconds=5")
    ranks = training(program, 2, tiny_pretrain, f"run_dir={tmp_path}", *settings)
    wait_until(lambda: list((tmp_path / "checkpoints").glob("*.tmp")), "a save under way")
    ranks[1].send_signal(signal.SIGSTOP)
    assert ranks[0].wait(timeout=60) == 1
    assert f"rank 1 on {socket.gethostname()}" in ranks[0].err


@pytest.mark.row(17)
@pytest.mark.alone
def test_a_rank_that_is_stopped_three_quarters_of_the_time_is_named(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    ranks = training(program, 2, tiny_pretrain, f"run_dir={tmp_path}", *ENDLESS, "checkpoint.every=0")
    begun = len(steps(tmp_path))

    def said() -> bool:
        log = (tmp_path / "train.log").read_text(encoding="utf-8")
        return f"rank 1 on {socket.gethostname()} keeps the others waiting" in log

    while not said():
        assert len(steps(tmp_path)) <= begun + 21
        ranks[1].send_signal(signal.SIGSTOP)
        time.sleep(0.012)
        ranks[1].send_signal(signal.SIGCONT)
        time.sleep(0.004)


@pytest.mark.row(19)
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_an_infinite_loss_on_one_rank_is_skipped_by_every_rank(
    tiny_pretrain: Path, tmp_path: Path, program: Program, stage: int
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "train.steps=12", *layout(2, stage))
    ranks = start_ranks(
        program, 2, *command, patch="poisoned_loss", FROM=6, UNTIL=6, FACTOR="inf", ONLY_RANK=1
    )  # fmt: skip
    for rank in ranks:
        done(rank)
    assert [line["step"] for line in steps(tmp_path) if line["skipped"]] == [6]
    assert [line["step"] for line in events(tmp_path, "skip")] == [6]
    assert all(line["loss"] is not None for line in steps(tmp_path)[6:])


@pytest.mark.row(22)
@pytest.mark.row(23)
def test_experts_of_a_rank_that_get_no_token_have_gradients_of_zero(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    """Every token goes to two experts of rank 0; nothing crashes, and the alarm names the layers."""
    settings = (*SHORT, "train.steps=40", "train.balance.bias_update_rate=0", *layout(2, 1))
    ranks = start_ranks(
        program, 2, "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings, patch="two_experts_take_all"
    )
    for rank in ranks:
        done(rank)
    assert all(layer["dead_share"] == 0.75 for line in steps(tmp_path) for layer in line["experts"])
    assert all(line["loss"] is not None and not line["skipped"] for line in steps(tmp_path))
    gradients = [
        line for rank in ranks for line in rank.out.splitlines() if line.startswith("gradient of idle experts")
    ]
    assert gradients
    assert set(gradients) == {"gradient of idle experts 0.0"}
    said = " ".join(line["message"] for line in events(tmp_path, "alarm"))
    assert "layer 0" in said
    assert "layer 1" in said
