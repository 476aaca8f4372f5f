"""launch/torchrun.sh on one machine: how it stops, and what it does not start again."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_lm.train.folder import RunFolder
from tests.processes import ENVIRONMENT, ROOT, free_port, hears_signals, losses, runs, train_alone, wait_until

SETTINGS = ("train.steps=60", "train.eval_every=0", "checkpoint.every=0")
Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbs."""
    return train_alone(tiny_pretrain, tmp_path_factory.mktemp("one"), *SETTINGS)


@pytest.fixture
def launch(tiny_pretrain: Path, tmp_path: Path) -> Iterator[Launch]:
    """Starts a run of two ranks in `tmp_path`, which also holds the launcher's folder."""
    started = []

    def start(*settings: str, ignored: tuple[signal.Signals, ...] = (), **environment: str) -> subprocess.Popen[str]:
        def ignore() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        command = ["bash", "launch/torchrun.sh", str(tiny_pretrain), f"run_dir={tmp_path / 'run'}"]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = ENVIRONMENT | {"PATH": path, "NPROC": "2", "TMPDIR": str(tmp_path)} | environment
        process = subprocess.Popen(
            [*command, *SETTINGS, *settings], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | variables, cwd=ROOT, preexec_fn=ignore,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    wait_until(lambda: not ranks(tmp_path), "the last rank to end", seconds=60)


def ranks(tmp_path: Path) -> list[int]:
    """The ranks that run, by process id."""
    said = [int(file.name.removeprefix("rank-")) for file in tmp_path.glob("moe-lm-*/rank-*")]
    return [pid for pid in said if Path(f"/proc/{pid}").exists()]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def train_to(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    wait_until(lambda: len(losses(run_dir)) >= step or not runs(process), f"step {step}")


def finish(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(signal.Signals(n), marks=pytest.mark.slow) for n in (1, 2, 10))]
)
def test_a_signal_saves_on_all_ranks_and_the_printed_line_goes_on(
    launch: Launch, tmp_path: Path, one_process: Path, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    process = launch()
    train_to(process, run_dir, 3)
    process.send_signal(number)
    code, lines = finish(process)
    assert code == 75
    stopped_at = len(losses(run_dir))
    assert 3 <= stopped_at < 60
    assert not any("Traceback" in line or "torch/" in line for line in lines)
    message, _, typed = lines[-1].partition(", run again: ")
    assert message == f"stopped after step {stopped_at}; to go on"
    assert typed.startswith("NPROC=2 bash launch/torchrun.sh ")
    assert f"run_dir={run_dir}" in shlex.split(typed)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    again = subprocess.run(typed, shell=True, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert f"going on after step {stopped_at} of 60" in again.stdout
    assert losses(run_dir) == pytest.approx(losses(one_process), rel=1e-6)


def test_a_usage_error_is_said_once_and_starts_nothing_again(launch: Launch, tmp_path: Path) -> None:
    """What only the ranks can see: it depends on their number."""
    code, (said,) = finish(launch("train.global_batch_size=7", "train.micro_batch_size=1"))
    assert code == 2
    assert said.startswith("error: train.global_batch_size=7 is not divisible by the 2 processes")


@pytest.mark.slow
def test_the_verb_starts_its_own_processes_and_stops_as_torchrun_does(
    tiny_pretrain: Path, tmp_path: Path, one_process: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "moe_lm", "pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *SETTINGS]
    environment = os.environ | ENVIRONMENT | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*command, "--processes", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    train_to(process, run_dir, 3)
    process.terminate()
    code, lines = finish(process)
    message, _, typed = lines[-1].partition(", run again: ")
    assert (code, message) == (75, f"stopped after step {len(losses(run_dir))}; to go on")
    assert shlex.split(typed)[-2:] == ["--processes", "2"]
    again = subprocess.run(shlex.split(typed), capture_output=True, text=True, env=environment, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert losses(run_dir) == pytest.approx(losses(one_process), rel=1e-6)
    assert not ranks(tmp_path)


@pytest.mark.slow
def test_a_run_folder_in_use_is_said_once(launch: Launch, tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run"):
        code, lines = finish(launch(MAX_RESTARTS="0"))
    assert code == 1
    assert [line for line in lines if line.startswith(("error", "internal", "rank"))] == lines[:1]
    assert f"is in use by process {os.getpid()} on " in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("begun", [lambda folder: True, ranks], ids=["before the ranks", "in their start"])
def test_a_stop_at_the_start_saves_nothing(launch: Launch, tmp_path: Path, begun: Callable[[Path], object]) -> None:
    process = launch()
    wait_until(lambda: hears_signals(process.pid) and begun(tmp_path), "the time for the signal")
    process.send_signal(signal.SIGTERM)
    assert finish(process) == (75, ["stopped before the first step; nothing to save"])
    assert not list(tmp_path.glob("moe-lm-*"))


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_a_kill_takes_the_ranks_along(launch: Launch, tmp_path: Path) -> None:
    process = launch("train.steps=1000000", "checkpoint.every=1")
    train_to(process, tmp_path / "run", 1)
    (rank, _) = ranks(tmp_path)
    os.kill(rank, signal.SIGSTOP)  # so that it does not stop at the first one
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=2)
    process.terminate()
    assert process.wait(timeout=5) == 143
    wait_until(lambda: not ranks(tmp_path), "the ranks to end", seconds=30)
    process = launch("train.steps=1000000", "checkpoint.every=1")
    train_to(process, tmp_path / "run", len(losses(tmp_path / "run")) + 1)
    process.kill()
    wait_until(lambda: not ranks(tmp_path), "the ranks to end", seconds=30)


@pytest.mark.slow
def test_under_nohup_it_does_not_hear_the_terminal(launch: Launch, tmp_path: Path) -> None:
    process = launch("train.steps=1000000", ignored=(signal.SIGHUP, signal.SIGINT))
    train_to(process, tmp_path / "run", 1)
    for number in (signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
    train_to(process, tmp_path / "run", len(losses(tmp_path / "run")) + 5)
    process.terminate()
    assert finish(process)[0] == 75


@pytest.mark.slow
def test_restarts_are_counted_from_the_last_one_that_saved_a_later_step(launch: Launch, tmp_path: Path) -> None:
    """With one restart: three deaths with a checkpoint between them are survived, two without end the run."""
    process, run_dir = launch("checkpoint.every=4", "train.steps=1000000", MAX_RESTARTS="1"), tmp_path / "run"
    for _ in range(3):
        train_to(process, run_dir, len(losses(run_dir)) + 10)
        os.kill(ranks(tmp_path)[0], signal.SIGKILL)
        wait_until(lambda: not ranks(tmp_path), "the ranks to end", seconds=60)
        wait_until(lambda: len(ranks(tmp_path)) == 2, "the ranks to start again", seconds=60)
    shutil.rmtree(run_dir / "checkpoints")  # so that none is later
    os.kill(ranks(tmp_path)[0], signal.SIGKILL)
    code, lines = finish(process)
    assert code == 1
    assert lines[-1].startswith("torchrun: rank ")
    assert lines[-1].endswith(", and no restart is left")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [12, 9])
def test_training_goes_on_with_two_machines_of_three(
    launch: Launch, tmp_path: Path, tiny_pretrain: Path, rows: int
) -> None:
    """Three agents stand for three machines. The last is killed with its rank, and does not come back."""
    port = free_port()
    machines = {"NNODES": "2:3", "NPROC": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_dir = tmp_path / "run"
    settings = ("checkpoint.every=5", f"train.global_batch_size={rows}", "train.micro_batch_size=1")
    agents = [launch(*settings, **machines)]
    wait_until(lambda: listens(port), "the first machine, where all meet")
    agents += [launch(*settings, **machines) for _ in range(2)]
    train_to(agents[0], run_dir, 12)
    agents[2].kill()
    outputs = [finish(agent) for agent in agents[:2]]
    lines = [line for _, output in outputs for line in output]
    assert len([line for line in lines if "lost rank " in line]) == 1, lines
    if rows == 9:
        assert {code for code, _ in outputs} == {2}
        assert sum("train.global_batch_size=9 is not divisible by the 2 processes" in line for line in lines) == 1
        return
    assert {code for code, _ in outputs} == {0}, lines
    assert any(line.startswith("going on after step ") for line in lines)
    assert "2 processes instead of 3: the same 12 rows a step, 6 of them on each" in lines
    alone = train_alone(tiny_pretrain, tmp_path / "alone", *SETTINGS, *settings)
    assert losses(run_dir) == pytest.approx(losses(alone), rel=1e-6)
