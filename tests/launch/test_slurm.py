"""launch/slurm.sbatch on a Slurm of two nodes: whatever ends a run early, the job goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .slurm_cluster import NODES, Cluster, missing, wait_until

ROOT = Path(__file__).parents[2]
SETTINGS = ("train.steps=200", "checkpoint.every=10", "checkpoint.keep=99", "train.eval_every=0", "log.every=1")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "RESTART_DELAY": "1",
}


@pytest.fixture(scope="module")
def whole_cluster() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path, for munged's socket
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    """Skips where there can be none; fails when a test leaves a process on a node."""
    whole_cluster.mend()
    yield whole_cluster
    wait_until(lambda: not whole_cluster.left_over(), "the last process to end, but there are", whole_cluster.left_over)


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("one")
    command = [sys.executable, "-m", "moe_lm", "pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *SETTINGS]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | ENVIRONMENT)
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    """By step, from the first to the last that was logged; each step stands there once."""
    log = run_dir / "metrics.jsonl"
    if not log.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


class Job:
    """A training of two tasks, one a node."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path, *settings: str) -> None:
        self.cluster, self.run_dir, self.log = cluster, folder / "run", folder / "job.log"
        place = ("--nodes=2", "--ntasks-per-node=1", f"--output={self.log}", f"--chdir={folder}")
        command = ("sbatch", "--parsable", *place, str(ROOT / "launch" / "slurm.sbatch"))
        self.number = cluster.run(*command, str(config), f"run_dir={self.run_dir}", *SETTINGS, *settings, **ENVIRONMENT)

    def train_to(self, step: int) -> None:
        wait_until(lambda: len(losses(self.run_dir)) >= step, f"step {step}", self.output)

    def wait_for_requeue(self, restarts: int) -> None:
        """Slurm keeps a job back for two minutes before it starts again; not this one."""
        wait_until(lambda: self["Restarts"] == str(restarts) and self["JobState"] == "PENDING", "requeue", self.output)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def finish(self) -> str:
        """The state in which it ended."""
        wait_until(lambda: self["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end", self.output)
        return self["JobState"]

    def __getitem__(self, field: str) -> str:
        return self.cluster.job(self.number)[field]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def test_two_nodes_train_as_one_process_does(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, one_process: list[float]
) -> None:
    job = Job(cluster, tiny_pretrain, tmp_path)
    assert job.finish() == "COMPLETED", job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)
    lines = job.output().splitlines()
    assert lines[0].startswith("pretrain 1/200"), job.output()
    assert len(lines) == len(set(lines)), job.output()  # rank 0's alone


def test_a_run_that_is_told_to_stop_goes_back_into_the_queue(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, one_process: list[float]
) -> None:
    """By a job of higher priority, which Slurm makes room for; then by a signal, as the time limit sends it."""
    job = Job(cluster, tiny_pretrain, tmp_path)
    job.train_to(15)
    other = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    job.wait_for_requeue(1)
    first = len(losses(job.run_dir))
    job.train_to(first + 5)
    assert cluster.job(other)["JobState"] == "COMPLETED"
    cluster.run("scancel", "--signal=TERM", job.number)
    job.wait_for_requeue(2)
    second = len(losses(job.run_dir))
    assert first < second < len(one_process)
    assert {first, second} <= set(checkpoints(job.run_dir))
    assert job.finish() == "COMPLETED"
    for step in (first, second):
        assert f"stopped after step {step}; to go on, run again: moe-lm pretrain" in job.output()
        assert f"going on after step {step} of 200" in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


def test_a_killed_task_is_started_again_with_the_others(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, one_process: list[float]
) -> None:
    job = Job(cluster, tiny_pretrain, tmp_path)
    job.train_to(15)
    os.kill(cluster.task("n2"), signal.SIGKILL)
    assert job.finish() == "COMPLETED", job.output()
    assert job["Restarts"] == "0"
    assert "task 1: Killed" in job.output()
    assert "it is started again in 1 s" in job.output()
    assert "going on after step" in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


@pytest.mark.parametrize("node", NODES)
def test_after_a_node_is_lost_the_job_goes_on_from_the_checkpoint(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, one_process: list[float], node: str
) -> None:
    job = Job(cluster, tiny_pretrain, tmp_path)
    job.train_to(15)
    cluster.lose_node(node)
    job.wait_for_requeue(1)
    assert len(losses(job.run_dir)) < len(one_process)
    cluster.start_node(node)
    assert job.finish() == "COMPLETED", job.output()
    assert "going on after step" in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


def test_a_wrong_setting_is_told_and_not_tried_again(cluster: Cluster, tiny_pretrain: Path, tmp_path: Path) -> None:
    job = Job(cluster, tiny_pretrain, tmp_path, "train.global_batch_size=7", "train.micro_batch_size=1")
    assert job.finish() == "FAILED"
    assert job["ExitCode"] == "2:0"
    assert "train.global_batch_size=7 is not divisible by the 2 processes of this run" in job.output()
    assert "started again" not in job.output()
