"""Two hosts on one machine, for tests of the launchers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.namespaces import SEARCH_PATH, missing, processes_beside
from tests.processes import ROOT, wait_until

PROGRAMS = ("ip", "ssh", "sshd", "ssh-keygen", "pdsh", "nsenter", "setpriv", "unshare")
NAMESPACES = ("--net", "--uts", "--mount", "--pid")
INTERFACE = "fabric0"
BOOT = f"""
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
mount -t tmpfs tmpfs /run
mkdir /run/sshd
hostname "$2"
ip link set lo up
exec {shutil.which("sshd", path=SEARCH_PATH)} -D -e
"""
SSH_CONFIG = """
IdentityFile /etc/ssh/identity
BatchMode yes
StrictHostKeyChecking yes
LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/identity.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
"""


class Host:
    """A machine as far as its processes can tell: it has a network, a name, an /etc/ssh and process ids of its own.

    Its first process is sshd; when that ends, the kernel ends all others, as when the power goes. Nothing of it has a
    name outside, so that nothing collides with another run and nothing can be left behind.
    """

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder
        # setpriv: it dies with this process, however that ends
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        with (folder / f"{name}.log").open("a") as log:
            self.machine = subprocess.Popen([*command, "sh", "-ec", BOOT, "sh", str(folder), name], stderr=log)
        children = Path(f"/proc/{self.machine.pid}/task/{self.machine.pid}/children")
        wait_until(lambda: children.read_text().split(), f"{name} to start", seconds=60)
        self.init = int(children.read_text())
        self.enter = ["nsenter", f"--target={self.init}", *NAMESPACES]
        wait_until(
            lambda: ":0016 " in Path(f"/proc/{self.init}/net/tcp").read_text(), f"the sshd of {name}", seconds=60
        )

    def start(self, script: str, *arguments: object, **environment: object) -> subprocess.Popen[str]:
        """Run a script of this project in the host's folder; as after a login, the environment is nearly empty."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        variables = {"PATH": path, "HOME": self.folder, "PYTHONPATH": ROOT} | environment
        settings = [f"{name}={value}" for name, value in variables.items()]
        command = ["env", "--ignore-environment", f"--chdir={self.folder}", *settings, "bash", str(ROOT / script)]
        return subprocess.Popen(
            [*self.enter, *command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ip(self, arguments: str, check: bool = True) -> None:
        subprocess.run(
            [*self.enter, "ip", *arguments.split()], check=check, stderr=None if check else subprocess.DEVNULL
        )

    def processes(self) -> dict[int, list[str]]:
        """The command lines of all that run here, but sshd, by process id as seen from outside."""
        found = processes_beside(self.init)
        return {pid: line for pid, line in found.items() if not line[0].startswith("sshd:")}

    def process(self, part: str) -> int:
        """The id of the one process whose command line holds `part`."""
        (pid,) = [pid for pid, line in self.processes().items() if part in " ".join(line)]
        return pid

    def rank(self) -> int:
        """The id of the one rank; launchers have its command line within theirs."""
        (pid,) = [pid for pid, line in self.processes().items() if line[1:4] == ["-u", "-m", "moe_lm"]]
        return pid

    def lose(self) -> None:
        """Everything here ends at once."""
        os.kill(self.init, signal.SIGKILL)
        self.machine.wait()


class TwoHosts:
    """`node-a` and `node-b`, joined by a cable between their interfaces, which have the same name on both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        network = f"10.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"
        self.addresses = {"node-a": f"{network}.1", "node-b": f"{network}.2"}
        self.hosts: dict[str, Host] = {}
        lines = [f"{address} {name}\n" for name, address in self.addresses.items()]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines), encoding="utf-8")
        (folder / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n", encoding="utf-8")
        ssh = folder / "ssh"
        ssh.mkdir()
        for key in ("identity", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
        (ssh / "ssh_known_hosts").write_text("node-a,node-b " + (ssh / "host_key.pub").read_text(), encoding="utf-8")
        (ssh / "ssh_config").write_text(SSH_CONFIG, encoding="utf-8")
        (ssh / "sshd_config").write_text(SSHD_CONFIG, encoding="utf-8")

    def start(self) -> None:
        """Start the hosts that are not there, and lay the cable."""
        for name, address in self.addresses.items():
            if name not in self.hosts or self.hosts[name].machine.poll() is not None:
                self.hosts[name] = Host(name, address, self.folder)
        a, b = self.hosts.values()
        for host in (a, b):  # an end whose other end was lost goes by itself, but in its own time
            host.ip(f"link delete {INTERFACE}", check=False)
        cable = f"{INTERFACE} netns {a.init} type veth peer name {INTERFACE} netns {b.init}"
        subprocess.run(["ip", "link", "add", *cable.split()], check=True)
        for host in (a, b):
            host.ip(f"address add {host.address}/24 dev {INTERFACE}")
            host.ip(f"link set {INTERFACE} up")

    def wait_until_idle(self) -> None:
        """Fails when a process goes on although what started it has ended."""
        running = [host for host in self.hosts.values() if host.machine.poll() is None]
        wait_until(
            lambda: not any(host.processes() for host in running),
            "the last process to end, but there are",
            lambda: {host.name: host.processes() for host in running},
            seconds=60,
        )

    def stop(self) -> None:
        for host in self.hosts.values():
            host.lose()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    """Skips where they cannot be made; fails when a test leaves a process on one of them."""
    if reason := missing(PROGRAMS, "iproute2 openssh-server pdsh", NAMESPACES):
        pytest.skip(reason)
    hosts = TwoHosts(tmp_path)
    try:
        hosts.start()
        yield hosts
        hosts.wait_until_idle()
    finally:
        hosts.stop()
