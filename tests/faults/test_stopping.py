"""Signals, a closed terminal, a clock that jumps, a log that cannot be written (rows 13, 14, 35)."""

from __future__ import annotations

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_lm.checkpoint import checkpoint
from tests.faults.conftest import SHORT, Program, done, losses_of, steps
from tests.processes import ENVIRONMENT, ROOT, wait_until

STOPPED = 75  # everything is saved; the same command goes on
ENDLESS = (*SHORT, "train.steps=100000", "checkpoint.every=0")
Harm = Callable[..., dict[str, object]]


def saved_step(run_dir: Path) -> int:
    newest = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    checkpoint.verify(newest)
    return int(newest.name.removeprefix("step-"))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.row(13)),
        pytest.param(signal.SIGINT, marks=pytest.mark.row(14)),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.row(13)),
        pytest.param(signal.SIGHUP, marks=pytest.mark.row(35)),
    ],
)
def test_a_signal_in_training_saves_and_says_how_to_go_on(
    tiny_pretrain: Path, tmp_path: Path, program: Program, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    command = ("pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *ENDLESS)
    process = program(*command)
    wait_until(lambda: len(steps(run_dir)) >= 3 or process.poll() is not None, "steps")
    process.send_signal(number)
    assert process.wait(timeout=20) == STOPPED, process.err
    assert "Traceback" not in process.out + process.err
    assert saved_step(run_dir) == len(steps(run_dir))
    log = (run_dir / "train.log").read_text(encoding="utf-8")
    said = re.search(r"to go on, run again: (.*)", log)
    assert said
    assert shlex.split(said[1])[1:] == ["-m", "moe_lm", *command]


@pytest.mark.slow
@pytest.mark.row(13)
@pytest.mark.parametrize("last", [False, True], ids=["an evaluation", "the last evaluation"])
def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(
    tiny_pretrain: Path, tmp_path: Path, program: Program, last: bool
) -> None:
    run_dir = tmp_path / "run"
    settings = ("train.steps=5", "train.eval_every=0" if last else "train.eval_every=4")
    settings += ("train.micro_batch_size=1",)
    begun = tmp_path / "evaluation"
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={run_dir}", *ENDLESS, *settings, patch="slow_evaluation", BEGUN=begun
    )
    wait_until(lambda: begun.exists() or process.poll() is not None, "an evaluation")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) in ({0, STOPPED} if last else {STOPPED}), process.err
    assert saved_step(run_dir) == (5 if last else 4)


@pytest.mark.slow
@pytest.mark.row(13)
@pytest.mark.row(14)
def test_a_second_signal_ends_at_once(tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm) -> None:
    run_dir = tmp_path / "run"
    how = harm(mode="slow", under=run_dir / "checkpoints")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *ENDLESS, **how)
        before = len(steps(run_dir))
        wait_until(lambda: len(steps(run_dir)) > before + 2 or process.poll() is not None, "steps")  # noqa: B023
        process.send_signal(number)
        time.sleep(0.7)  # sooner it would count as the same one, which a terminal and a launcher both send
        process.send_signal(number)
        assert process.wait(timeout=5) in (128 + number, -number), process.err


@pytest.mark.slow
@pytest.mark.row(13)
@pytest.mark.row(14)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(
    "after", [0.3, pytest.param(1.0, marks=pytest.mark.slow), pytest.param(2.5, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_first_seconds_ends_with_a_sentence(
    tiny_pretrain: Path, tmp_path: Path, number: signal.Signals, after: float
) -> None:
    """With the imports: this one is started as a shell does."""
    command = [sys.executable, "-m", "moe_lm", "pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *ENDLESS]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | ENVIRONMENT, cwd=ROOT
    )
    time.sleep(after)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == STOPPED, output
    assert "Traceback" not in output
    assert output.strip(), "it says that it was stopped"


@pytest.mark.row(13)
@pytest.mark.slow
def test_a_signal_in_the_first_compilation_is_heard(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    run_dir = tmp_path / "run"
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *ENDLESS, "train.compile=true")
    wait_until(lambda: (run_dir / "train.log").exists() or process.poll() is not None, "the start")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=180) == STOPPED, process.err
    assert saved_step(run_dir) >= 1


# The machine around it


@pytest.mark.slow
@pytest.mark.row(35)
def test_a_closed_terminal_does_not_lose_a_step(tiny_pretrain: Path, tmp_path: Path) -> None:
    """A real terminal, whose other end is closed while training runs."""
    run_dir = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(ENVIRONMENT)
        command = ["-m", "moe_lm", "pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *ENDLESS]
        os.execv(sys.executable, [sys.executable, *command])
    try:
        wait_until(lambda: len(steps(run_dir)) >= 5, "steps")
        os.close(terminal)
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert os.waitstatus_to_exitcode(ended[1]) == STOPPED
    assert saved_step(run_dir) == len(steps(run_dir))
    assert "to go on, run again" in (run_dir / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.row(35)
def test_nohup_trains_on(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    run_dir = tmp_path / "run"
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *ENDLESS, patch="ignores_hang_up")
    wait_until(lambda: len(steps(run_dir)) >= 3 or process.poll() is not None, "steps")
    process.send_signal(signal.SIGHUP)
    before = len(steps(run_dir))
    wait_until(lambda: len(steps(run_dir)) > before + 5 or process.poll() is not None, "more steps")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == STOPPED


@pytest.mark.slow
@pytest.mark.row(35)
@pytest.mark.parametrize("seconds", [-31_536_000, 31_536_000])
def test_a_clock_that_jumps_a_year_changes_nothing(
    whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm, seconds: int
) -> None:
    run_dir, jump = tmp_path / "run", tmp_path / "jump"
    how = harm(clock=seconds, clock_file=jump)
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, **how)
    wait_until(lambda: len(steps(run_dir)) >= 10 or process.poll() is not None, "steps")
    jump.touch()
    done(process)
    assert losses_of(run_dir) == losses_of(whole)


@pytest.mark.slow
@pytest.mark.row(35)
def test_a_full_log_disk_costs_lines_and_no_steps(
    whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program, harm: Harm
) -> None:
    run_dir = tmp_path / "run"
    how = harm(mode="enospc", under=run_dir / "metrics.jsonl", at=8, on=1)
    process = program("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, **how)
    done(process)
    assert "No space left" in process.out + process.err
    assert saved_step(run_dir) == 60
    found = {line["step"]: line["loss"] for line in steps(run_dir)}
    expected = {line["step"]: line["loss"] for line in steps(whole)}
    assert found.items() <= expected.items()
