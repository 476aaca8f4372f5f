"""The launchers over two hosts: they train as one process does, report what died, and go on from the checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.processes import ROOT, hears_signals, losses, runs, train_alone, wait_until

if TYPE_CHECKING:
    from tests.launch.conftest import Host, TwoHosts

STEPS = 120  # enough that the slowest way of stopping comes before the end
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=10", "train.eval_every=0")
# What a person sets where hosts have several networks.
NETWORK = {"GLOO_SOCKET_IFNAME": "fabric0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbs."""
    return train_alone(tiny_pretrain, tmp_path_factory.mktemp("one"), *SETTINGS)


def newest_checkpoint(run_dir: Path) -> int:
    return max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*[0-9]")), default=0)


def wait_for_checkpoint(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Until there is one of `step` or a later one."""
    wait_until(lambda: newest_checkpoint(run_dir) >= step or not runs(process), f"the checkpoint of step {step}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


@pytest.mark.slow
def test_deepspeed_trains_over_two_hosts_stops_when_told_and_goes_on_after_a_death(
    two_hosts: TwoHosts, tiny_pretrain: Path, tmp_path: Path, one_process: Path
) -> None:
    """Experts are spread over the hosts. SIGTERM to the launcher ends the first start, SIGKILL to a rank the second."""
    run_dir = tmp_path / "run"
    node_a, node_b = two_hosts.hosts.values()
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={NETWORK[name]}\n" for name in NETWORK), encoding="utf-8")
    layout = ("parallel.engine=deepspeed", "parallel.expert_parallel_size=2")
    command = ("launch/deepspeed.sh", tiny_pretrain, f"run_dir={run_dir}", *SETTINGS, *layout)

    def start() -> subprocess.Popen[str]:
        return node_a.start(*command, HOSTFILE=tmp_path / "hostfile")

    launcher = start()
    wait_for_checkpoint(launcher, run_dir, 10)
    os.kill(node_a.process("-m moe_lm.parallel.pdsh"), signal.SIGTERM)
    code, output = finish(launcher)
    assert code == 75, output
    stopped_at = len(losses(run_dir))
    assert 10 < stopped_at == newest_checkpoint(run_dir) < STEPS
    again = f"HOSTFILE={tmp_path / 'hostfile'} bash {ROOT / 'launch' / 'deepspeed.sh'} {tiny_pretrain} "
    assert f"node-a: stopped after step {stopped_at}; to go on, run again: {again}" in output

    launcher = start()
    wait_for_checkpoint(launcher, run_dir, newest_checkpoint(run_dir) + 1)
    os.kill(node_b.rank(), signal.SIGKILL)
    code, output = finish(launcher)
    assert code == 256 - signal.SIGKILL  # as the launcher of node-b told pdsh
    assert "exits with return code = -9" in output
    two_hosts.wait_until_idle()
    assert len(losses(run_dir)) < STEPS

    code, output = finish(start())
    assert code == 0, output
    assert "going on after step" in output
    assert losses(run_dir) == pytest.approx(losses(one_process), rel=1e-6)


@pytest.mark.slow
def test_deepspeed_says_a_usage_error_once_and_stops_at_its_start(
    two_hosts: TwoHosts, tiny_pretrain: Path, tmp_path: Path
) -> None:
    node_a = two_hosts.hosts["node-a"]
    command = ("launch/deepspeed.sh", tiny_pretrain, f"run_dir={tmp_path / 'run'}", "parallel.engine=deepspeed")
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={NETWORK[name]}\n" for name in NETWORK), encoding="utf-8")
    code, output = finish(
        node_a.start(*command, "train.global_batch_size=7", "train.micro_batch_size=1", HOSTFILE=tmp_path / "hostfile")
    )
    assert code == 2, output
    said = [line for line in output.splitlines() if "error" in line]
    assert len(said) == 1, output
    assert said[0].startswith("node-a: error: train.global_batch_size=7 is not divisible by the 2 processes")
    launcher = node_a.start(*command, HOSTFILE=tmp_path / "hostfile")
    mine = "-m moe_lm.parallel.pdsh"
    wait_until(lambda: any(mine in " ".join(line) for line in node_a.processes().values()), "the launcher")
    wait_until(lambda: hears_signals(node_a.process(mine)), "its handlers")
    os.kill(node_a.process(mine), signal.SIGTERM)
    code, output = finish(launcher)
    assert code == 75
    assert output.endswith("stopped before the first step; nothing to save\n")


def test_torchrun_starts_all_again_after_a_death_and_when_a_lost_host_is_back(
    two_hosts: TwoHosts, tiny_pretrain: Path, tmp_path: Path, one_process: Path
) -> None:
    """The same line on both hosts, and again on one of them after it went down."""
    run_dir = tmp_path / "run"

    def start(host: Host) -> subprocess.Popen[str]:
        environment = {"MASTER_ADDR": "node-a", "NNODES": 2, "NPROC": 1} | NETWORK
        return host.start("launch/torchrun.sh", tiny_pretrain, f"run_dir={run_dir}", *SETTINGS, **environment)

    node_a, node_b = two_hosts.hosts.values()
    agent_a, agent_b = start(node_a), start(node_b)
    wait_for_checkpoint(agent_a, run_dir, 10)
    os.kill(node_b.rank(), signal.SIGKILL)
    wait_for_checkpoint(agent_a, run_dir, newest_checkpoint(run_dir) + 11)
    node_b.lose()
    code, output = finish(agent_b)
    assert code == -signal.SIGKILL
    assert "(exitcode: -9)" in output
    assert len(losses(run_dir)) < STEPS

    two_hosts.start()
    code, output = finish(start(two_hosts.hosts["node-b"]))
    assert code == 0, output
    code, output = finish(agent_a)
    assert code == 0, output
    assert output.count("going on after step") == 2
    assert losses(run_dir) == pytest.approx(losses(one_process), rel=1e-6)


@pytest.mark.slow
def test_torchrun_stops_on_both_hosts_when_one_is_told(
    two_hosts: TwoHosts, tiny_pretrain: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = ("train.steps=100000", "train.eval_every=0", "checkpoint.every=0")
    environment = {"MASTER_ADDR": "node-a", "NNODES": 2, "NPROC": 1} | NETWORK
    command = ("launch/torchrun.sh", tiny_pretrain, f"run_dir={run_dir}", *settings)
    agents = [host.start(*command, **environment) for host in two_hosts.hosts.values()]
    wait_until(lambda: losses(run_dir) or not all(map(runs, agents)), "a step")
    os.kill(two_hosts.hosts["node-b"].process("-m moe_lm.parallel.torchrun"), signal.SIGTERM)
    (code_a, output_a), (code_b, output_b) = map(finish, agents)
    assert (code_a, code_b) == (75, 75), output_a + output_b
    assert f"stopped after step {newest_checkpoint(run_dir)}; to go on, run again: NNODES=2 NPROC=1 " in output_a
    assert "Traceback" not in output_a + output_b
