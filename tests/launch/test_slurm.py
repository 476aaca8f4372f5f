"""launch/slurm.sbatch on a Slurm of two nodes: whatever ends a run early, the job goes on from its checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.namespaces import missing
from tests.launch.slurm_cluster import NAMESPACES, PROGRAMS, Cluster
from tests.processes import ENVIRONMENT, ROOT, losses, train_alone, wait_until

STEPS = 80
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=5", "checkpoint.keep=99", "log.every=5")
AGAIN = "RESTART_DELAY=1 sbatch --nodes=2 --ntasks-per-node=1 --time={limit} launch/slurm.sbatch"
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def whole_cluster() -> Iterator[Cluster]:
    if reason := missing(PROGRAMS, "slurm-wlm munge", NAMESPACES):
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
    left = whole_cluster.left_over
    wait_until(lambda: not left(), "the last process to end, but there are", left)


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run that nothing disturbs."""
    return losses(train_alone(tiny_pretrain, tmp_path_factory.mktemp("one"), *SETTINGS))


class Job:
    """A training of two tasks, one a node."""

    def __init__(self, cluster: Cluster, config: Path, folder: Path, *settings: str, limit: str = "60:00") -> None:
        self.cluster, self.run_dir, self.log = cluster, folder / "run", folder / "job.log"
        place = ("--nodes=2", "--ntasks-per-node=1", f"--time={limit}", f"--output={self.log}", f"--chdir={folder}")
        command = ("sbatch", "--parsable", *place, str(ROOT / "launch" / "slurm.sbatch"))
        variables = ENVIRONMENT | {"PATH": PATH, "RESTART_DELAY": "1"}
        self.number = cluster.run(*command, str(config), f"run_dir={self.run_dir}", *SETTINGS, *settings, **variables)

    def train_to(self, step: int) -> None:
        wait_until(lambda: len(losses(self.run_dir)) >= step, f"step {step}", self.output)

    def wait_for_requeue(self, restarts: int) -> None:
        wait_until(lambda: self["Restarts"] == str(restarts), "a requeue", self.output)

    def finish(self) -> str:
        """The state in which it ended."""
        wait_until(lambda: self["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the job's end", self.output)
        return self["JobState"]

    def __getitem__(self, field: str) -> str:
        return self.cluster.job(self.number)[field]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


@pytest.fixture
def job(cluster: Cluster, tiny_pretrain: Path, tmp_path: Path) -> Job:
    return Job(cluster, tiny_pretrain, tmp_path)


def test_two_nodes_train_as_one_process_does(job: Job, one_process: list[float]) -> None:
    assert job.finish() == "COMPLETED", job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)
    lines = job.output().splitlines()
    assert lines[0].startswith(f"pretrain in {job.run_dir}: "), job.output()
    begun = next(number for number, line in enumerate(lines) if line.startswith("kernels: "))
    assert lines[begun + 1].startswith(f"pretrain 1/{STEPS}"), job.output()
    assert len(lines) == len(set(lines)), job.output()  # rank 0's alone


@pytest.mark.slow
def test_a_run_that_is_told_to_stop_goes_back_into_the_queue(
    cluster: Cluster, job: Job, one_process: list[float]
) -> None:
    """By Slurm, to make room for a job of higher priority; then by a signal such as comes ahead of the time limit."""
    job.train_to(7)
    other = cluster.run("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    job.wait_for_requeue(1)
    first = len(losses(job.run_dir))
    job.train_to(first + 3)
    assert cluster.job(other)["JobState"] == "COMPLETED"
    cluster.run("scancel", "--signal=TERM", job.number)
    job.wait_for_requeue(2)
    second = len(losses(job.run_dir))
    assert first < second < STEPS
    assert job.finish() == "COMPLETED", job.output()
    for step in (first, second):
        again = AGAIN.format(limit="1:00:00")
        assert f"stopped after step {step}; to go on, run again: {again}" in job.output()
        assert f"going on after step {step} of {STEPS}" in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


@pytest.mark.slow
def test_a_cancelled_job_does_not_come_back(cluster: Cluster, job: Job) -> None:
    job.train_to(3)
    cluster.run("scancel", job.number)
    assert job.finish() == "CANCELLED"
    assert job["Restarts"] == "0"
    assert len(losses(job.run_dir)) < STEPS


@pytest.mark.slow
def test_a_killed_task_is_started_again_with_the_others_on_the_same_nodes(
    cluster: Cluster, job: Job, one_process: list[float]
) -> None:
    job.train_to(7)
    os.kill(cluster.task("n2"), signal.SIGKILL)
    assert job.finish() == "COMPLETED", job.output()
    assert job["Restarts"] == "0"
    for line in ("task 1: Killed", "it is started again in 1 s", "going on after step"):
        assert line in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


# Of rank 0 and of the batch script, so that no one but Slurm can act; of rank 1, where the batch script sees it too.
@pytest.mark.slow
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_after_a_node_is_lost_the_job_goes_on_from_the_checkpoint(
    cluster: Cluster, job: Job, one_process: list[float], node: str
) -> None:
    job.train_to(7)
    cluster.lose_node(node)
    job.wait_for_requeue(1)
    wait_until(lambda: not cluster.left_over(), "the others to end", cluster.left_over)
    assert len(losses(job.run_dir)) < STEPS
    cluster.start_node(node)
    assert job.finish() == "COMPLETED", job.output()
    assert "going on after step" in job.output()
    assert losses(job.run_dir) == pytest.approx(one_process, rel=1e-6)


@pytest.mark.slow
def test_ahead_of_its_time_limit_a_job_saves_and_is_requeued(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path
) -> None:
    """The script asks for SIGTERM 120 s before, so that of three minutes one is left to train in."""
    job = Job(cluster, tiny_pretrain, tmp_path, "train.steps=1000000", "checkpoint.every=0", limit="3:00")
    job.wait_for_requeue(1)
    trained = len(losses(job.run_dir))
    again = AGAIN.format(limit="3:00")
    assert f"stopped after step {trained}; to go on, run again: {again}" in job.output()
    assert [path.name for path in (job.run_dir / "checkpoints").iterdir()] == [f"step-{trained:08d}"]
    job.train_to(trained + 1)
    cluster.run("scancel", job.number)
    assert job.finish() == "CANCELLED"


def test_a_wrong_setting_is_said_once_and_not_tried_again(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path
) -> None:
    job = Job(cluster, tiny_pretrain, tmp_path, "train.stepz=9")
    assert job.finish() == "FAILED"
    assert job["ExitCode"] == "2:0"
    (line,) = job.output().splitlines()
    assert line.startswith("error: ")
    assert "train.stepz" in line
