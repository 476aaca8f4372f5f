"""launch/slurm.sbatch on a real Slurm of two nodes: a job, a preemption that saves and requeues, a node lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.slurm_cluster import Cluster, free_ports, missing, wait_until

ROOT = Path(__file__).parents[2]
STEPS = 100  # enough that what disturbs the run comes before its end
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=10", "train.eval_every=0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Skips where it cannot be made."""
    if reason := missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # or munged refuses its socket
    slurm = Cluster(folder)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    run_dir = tmp_path_factory.mktemp("one")
    command = [sys.executable, "-m", "moe_lm", "pretrain", str(tiny_pretrain), f"run_dir={run_dir}", *SETTINGS]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return losses(run_dir)


def losses(run_dir: Path) -> list[float]:
    """By step; each step is logged once, also when it was trained again."""
    text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def submit(cluster: Cluster, config: Path, run_dir: Path) -> str:
    """The number of a job of two nodes with one task each."""
    return cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}", f"--output={run_dir}.out"),
        *(str(ROOT / "launch" / "slurm.sbatch"), str(config), f"run_dir={run_dir}", *SETTINGS),
        OMP_NUM_THREADS="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(free_ports()[0]),
        PATH=f"{Path(sys.executable).parent}:{cluster.environment['PATH']}",
    )


def wait_for(cluster: Cluster, job: str, state: str, run_dir: Path) -> None:
    def there() -> str:
        output = Path(f"{run_dir}.out")
        return f"{cluster.job(job)}\n{output.read_text() if output.exists() else ''}{cluster.log()}"

    wait_until(lambda: cluster.job(job)["JobState"] == state, f"job {job} to be {state}", there)


def wait_for_checkpoint(run_dir: Path) -> None:
    wait_until(lambda: list(run_dir.glob("checkpoints/step-*[0-9]")), "a checkpoint")


def assert_no_orphan(run_dir: Path) -> None:
    """No process, on whichever node, works for this run any more."""

    def left() -> list[str]:
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = file.read_text().replace("\0", " ")
            except OSError:  # it has ended
                continue
            if f"run_dir={run_dir}" in line:
                found.append(line)
        return found

    wait_until(lambda: not left(), "the last process to end, but there are", left)


def assert_goes_on(cluster: Cluster, job: str, run_dir: Path, undisturbed: list[float]) -> None:
    """From its checkpoint to the end, with the losses of the run that nothing disturbed."""
    wait_for(cluster, job, "COMPLETED", run_dir)
    assert cluster.job(job)["Restarts"] == "1"
    assert "going on after step" in Path(f"{run_dir}.out").read_text()
    assert losses(run_dir) == pytest.approx(undisturbed, rel=1e-6)
    assert_no_orphan(run_dir)


def test_a_job_of_two_nodes_trains_as_one_process_does(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, undisturbed: list[float]
) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tiny_pretrain, run_dir)
    wait_for(cluster, job, "COMPLETED", run_dir)
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    assert cluster.job(job)["Restarts"] == "0"
    assert losses(run_dir) == pytest.approx(undisturbed, rel=1e-6)
    assert_no_orphan(run_dir)


@pytest.mark.slow
def test_a_job_that_gets_sigterm_saves_is_requeued_and_goes_on(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, undisturbed: list[float]
) -> None:
    """To its tasks, as ahead of the time limit: only the script can requeue it then."""
    run_dir = tmp_path / "run"
    job = submit(cluster, tiny_pretrain, run_dir)
    wait_for_checkpoint(run_dir)
    cluster.run("scancel", "--signal=TERM", job)
    wait_for(cluster, job, "PENDING", run_dir)
    assert len(losses(run_dir)) < STEPS
    assert_goes_on(cluster, job, run_dir, undisturbed)


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_goes_on(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, undisturbed: list[float]
) -> None:
    """Slurm sends SIGTERM because a job of a higher partition wants the nodes."""
    run_dir = tmp_path / "run"
    job = submit(cluster, tiny_pretrain, run_dir)
    wait_for_checkpoint(run_dir)
    wanted = ("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/other.out", "--wrap=true")
    other = cluster.run("sbatch", "--parsable", *wanted)
    wait_for(cluster, other, "COMPLETED", run_dir)
    assert len(losses(run_dir)) < STEPS
    assert "stopped after step" in Path(f"{run_dir}.out").read_text()
    assert_goes_on(cluster, job, run_dir, undisturbed)


@pytest.mark.slow
def test_a_cancelled_job_does_not_come_back(cluster: Cluster, tiny_pretrain: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = submit(cluster, tiny_pretrain, run_dir)
    wait_for_checkpoint(run_dir)
    cluster.run("scancel", job)
    assert_no_orphan(run_dir)
    wait_until(lambda: not cluster.run("squeue", "--noheader", f"--jobs={job}"), "the job to leave the queue")
    assert cluster.job(job)["JobState"] == "CANCELLED"
    assert len(losses(run_dir)) < STEPS


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["n1", "n2"])
def test_a_job_that_loses_a_node_goes_on_when_it_is_back(
    cluster: Cluster, tiny_pretrain: Path, tmp_path: Path, undisturbed: list[float], lost: str
) -> None:
    """n1 is the node of rank 0 and of the batch script: there Slurm alone can requeue the job."""
    run_dir = tmp_path / "run"
    job = submit(cluster, tiny_pretrain, run_dir)
    wait_for_checkpoint(run_dir)
    cluster.lose_node(lost)
    wait_for(cluster, job, "PENDING", run_dir)
    assert_no_orphan(run_dir)
    assert len(losses(run_dir)) < STEPS
    cluster.start_node(lost)
    assert_goes_on(cluster, job, run_dir, undisturbed)
