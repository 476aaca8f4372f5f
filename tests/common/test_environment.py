"""What a rank has in its environment before it imports torch, and the cores that it keeps to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_lm.common import environment
from moe_lm.common.environment import AGENT_VARIABLES, VARIABLES, Machine, settings

SLURM = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_cores_are_divided_by_the_ranks_of_a_host_and_what_is_set_stays(variables: dict[str, str]) -> None:
    variables |= {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "XDG_CACHE_HOME": "/local"}
    found = {setting.name: (setting.value, setting.is_given) for setting in settings(VARIABLES, Machine(96, 8))}
    assert found["OMP_NUM_THREADS"] == found["TORCHINDUCTOR_COMPILE_THREADS"] == ("12", False)
    assert found["PYTORCH_CUDA_ALLOC_CONF"] == ("backend:native", True)
    assert "PYTORCH_ALLOC_CONF" not in found  # the same, by its other name
    assert found["TRITON_CACHE_DIR"] == ("/local/moe-lm/triton", False)
    environment.put(AGENT_VARIABLES, Machine(96, 8))
    assert variables["OMP_NUM_THREADS"] == "12"


@pytest.mark.parametrize(
    ("tasks", "cores_of_task", "cores", "of_rank"),
    [
        ("8(x2)", "5", 96, 5),  # a task is a rank
        ("8(x2)", "5", 5, 5),  # and bound to its cores
        ("1(x2)", "64", 64, 8),  # a task is torchrun, which starts eight ranks
        ("1(x2)", "32", 96, 4),
        ("1", "4", 96, 1),
    ],
)
def test_cores_of_a_task_of_slurm_are_divided_by_the_ranks_in_it(
    variables: dict[str, str], tasks: str, cores_of_task: str, cores: int, of_rank: int
) -> None:
    variables |= SLURM | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_CPUS_PER_TASK": cores_of_task}
    assert Machine(cores, 8).cores_of_rank == of_rank
    variables.pop("SLURM_STEP_ID")  # of the whole job, while this process is none of its tasks
    assert Machine(cores, 8).cores_of_rank == max(1, cores // 8)


def test_a_process_without_a_launcher_uses_all_cores(variables: dict[str, str]) -> None:
    variables["XDG_CACHE_HOME"] = "/local"
    names = {setting.name for setting in settings(VARIABLES, Machine(96, 0))}
    assert "PYTORCH_ALLOC_CONF" in names
    assert not names & {"OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "TORCH_GLOO_LAZY_INIT"}


@pytest.mark.parametrize(
    ("given", "ranks", "local_rank"),
    [
        ({}, 0, 0),
        ({"WORLD_SIZE": "1", "RANK": "0"}, 0, 0),
        ({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "3"}, 8, 3),
        ({"WORLD_SIZE": "16", "LOCAL_SIZE": "4"}, 4, 0),
        (SLURM, 8, 5),
        ({"SLURM_NTASKS": "16"}, 0, 0),  # the batch script
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2, 0),
    ],
)  # fmt: skip
def test_ranks_of_a_host_by_launcher(
    variables: dict[str, str], given: dict[str, str], ranks: int, local_rank: int
) -> None:
    variables |= given
    assert (environment.ranks_here(), environment.local_rank()) == (ranks, local_rank)


def test_a_rank_keeps_to_the_cores_near_its_gpu(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, cores in enumerate(("0-1,4-5", "2-3,6-7")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cores}\n")
    monkeypatch.setattr(environment, "DEVICES", tmp_path)
    monkeypatch.setattr(environment, "GPUS", tmp_path / "gpus")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None, raising=False)
    nodes = [{0, 1, 4, 5}, {2, 3, 6, 7}]
    assert [environment.near(rank, 4) for rank in range(4)] == [nodes[0], nodes[0], nodes[1], nodes[1]]
    for address, node in (("0000:1a:00.0", 1), ("0000:3b:00.0", 0)):
        (tmp_path / "gpus" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address).mkdir(parents=True)
        (tmp_path / "bus/pci/devices" / address / "numa_node").write_text(f"{node}\n")
    assert [environment.near(rank, 2) for rank in range(2)] == [nodes[1], nodes[0]]
    variables["CUDA_VISIBLE_DEVICES"] = "1,0"  # whose order is not known here
    assert environment.near(0, 2) == set()
    del variables["CUDA_VISIBLE_DEVICES"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)  # as Slurm binds a task
    assert environment.near(0, 2) == set()


def test_what_is_compiled_lies_on_a_disk_of_this_machine(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(environment, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(temporary))
    (tmp_path / "mounts").write_text("/dev/sda / ext4 rw 0 0\n")
    assert environment.local_cache() == home / ".cache/moe-lm"
    (tmp_path / "mounts").write_text(f"/dev/sda / ext4 rw 0 0\nserver:/home {home} nfs4 rw 0 0\n")
    own = temporary / f"moe-lm-{os.getuid()}"
    assert environment.local_cache() == own
    own.chmod(0o777)  # somebody else could put a library there
    with pytest.raises(PermissionError, match="is not this user's alone; XDG_CACHE_HOME can name another"):
        environment.local_cache()
