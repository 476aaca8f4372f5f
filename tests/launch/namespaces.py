"""Process ids, mounts and networks of their own, for machines that are simulated on this one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

SEARCH_PATH = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def missing(programs: Sequence[str], packages: str, namespaces: Sequence[str]) -> str:
    """The reason why machines cannot be simulated here; empty when they can."""
    absent = [name for name in programs if shutil.which(name, path=SEARCH_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install {packages}"
    may = subprocess.run(["unshare", *namespaces, "--fork", "true"], capture_output=True, text=True)
    if os.geteuid() != 0 or may.returncode != 0:
        return f"needs root and the right to make namespaces: {may.stderr.strip() or 'not root'}"
    return ""


def processes_beside(init: int) -> dict[int, list[str]]:
    """The command lines of all other processes in the namespace of `init`, by process id as seen from outside."""
    here, found = os.readlink(f"/proc/{init}/ns/pid"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns" / "pid") == here and int(folder.name) != init:
                found[int(folder.name)] = (folder / "cmdline").read_text().split("\0")[:-1]
        except OSError:  # it has ended
            continue
    return {pid: line for pid, line in found.items() if line}
