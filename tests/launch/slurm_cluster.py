"""A Slurm of two nodes on this machine, for tests of launch/slurm.sbatch."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
from pathlib import Path

from tests.launch.namespaces import SEARCH_PATH, processes_beside
from tests.processes import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "setpriv", "unshare")
NODES = ("n1", "n2")
NAMESPACES = ("--mount", "--pid")
# Short intervals, since a test waits for them. A node that does not answer for SlurmdTimeout is lost; ReturnToService
# takes it back when it is there again. A requeued job is held back for as long as credentials live, else two minutes.
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MessageTimeout=5
SlurmdTimeout=6
KillWait=20
CompleteWait=0
FirstJobId={first_job}
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Cluster:
    """munged, slurmctld and two slurmd. Everything they write is in `folder`, whose path must be short: sockets."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.chmod(0o755)  # or munged refuses its socket
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH_PATH}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        ports = free_ports()
        # a job's number gives its MASTER_PORT, which another test of this kind on this machine shall not have
        host, first_job = socket.gethostname().split(".")[0], secrets.randbelow(9000)
        config = CONFIG.format(host=host, folder=folder, ports=ports, first_job=first_job + 1)
        (folder / "slurm.conf").write_text(config, encoding="utf-8")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def start(self) -> None:
        files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        paths = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", *paths, f"--log-file={self.folder / 'munged.log'}")
        wait_until((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        self.mend()

    def mend(self) -> None:
        """Start the nodes that are not there, and wait until jobs can run on all of them."""
        for name in NODES:
            if name not in self.daemons or self.daemons[name].poll() is not None:
                self.start_node(name)
        wait_until(lambda: all(self.node(name)["State"] == "IDLE" for name in NODES), "the nodes", self.log)

    def start_node(self, name: str) -> None:
        """A node's processes have ids of their own: when the first one ends, the kernel ends all others."""
        machine = ("unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc")
        self._start(name, *machine, "sh", "-c", 'slurmd -D -N "$1" & wait', "sh", name)

    def lose_node(self, name: str) -> None:
        """Everything on it ends at once, as when the power goes."""
        self.daemons[name].kill()
        self.daemons[name].wait()

    def processes(self, name: str) -> dict[int, list[str]]:
        """The command lines of what jobs run on a node, by process id as seen from outside."""
        unshare = self.daemons[name].pid
        children = Path(f"/proc/{unshare}/task/{unshare}/children")
        if not children.exists() or not (init := children.read_text().strip()):
            return {}
        return {pid: line for pid, line in processes_beside(int(init)).items() if line[0] != "slurmd"}

    def task(self, name: str) -> int:
        """The process id of the one task that trains on a node."""
        (pid,) = [pid for pid, line in self.processes(name).items() if "pretrain" in line]
        return pid

    def left_over(self) -> list[list[str]]:
        return [line for name in NODES for line in self.processes(name).values()]

    def stop(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.kill()
            daemon.wait()

    def run(self, *command: str, **environment: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"{command} failed: {done.stderr}{self.log()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        return fields(self.run("scontrol", "--oneliner", "show", "job", number))

    def node(self, name: str) -> dict[str, str]:
        return fields(self.run("scontrol", "--oneliner", "show", "node", name))

    def log(self) -> str:
        """The last lines that every daemon wrote."""
        return "".join(f"\n{file.name}:\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.out")))

    def _start(self, name: str, *command: str) -> None:
        # setpriv: it dies with this process, however that ends
        with (self.folder / f"{name}.out").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], env=self.environment, stdout=log, stderr=log
            )


def fields(line: str) -> dict[str, str]:
    """`A=1 B=2` as a mapping."""
    return dict(part.split("=", 1) for part in line.split() if "=" in part)


def free_ports() -> list[int]:
    """One for slurmctld, and two in a row for the nodes."""
    while True:
        with socket.socket() as first, socket.socket() as second, socket.socket() as third:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            port = int(second.getsockname()[1])
            try:
                third.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return [int(first.getsockname()[1]), port, port + 1]
