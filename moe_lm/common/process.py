"""This process: the command that started it, its processor cores, and how it ends."""

from __future__ import annotations

import atexit
import ctypes
import os
import resource
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from moe_lm.common.exits import exit_code

COMMAND = "MOE_LM_COMMAND"  # the line that a person typed to start a launcher
IMPORTED = time.monotonic()
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def this_command() -> str:
    """The command line of this process, or of its launcher, as a person would type it."""
    return os.environ.get(COMMAND, "").rstrip() or shlex.join([*this_program(), *sys.argv[1:]])


def this_program() -> list[str]:
    """The words that start this program: its name if the shell finds it, else its path."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return [sys.executable, "-m", "moe_lm"]
    return [program.name if shutil.which(program.name) else str(program)]


def to_type(*words: object) -> str:
    """A command of this program for a person to type: quoted, and as this program is started."""
    return shlex.join([*this_program(), *map(str, words)])


def seconds_since_start() -> float:
    """Wall-clock seconds since this process began; where the system does not tell, since this module was imported."""
    with suppress(OSError, ValueError, IndexError, AttributeError):  # not Linux
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - IMPORTED


def how_to_install(extra: str) -> str:
    """The command that installs an extra of this project into the environment that runs it."""
    project = Path(__file__).parents[2]
    if (project / "pyproject.toml").is_file():
        return shlex.join([sys.executable, "-m", "pip", "install", "-e", f"{project}[{extra}]"])
    return shlex.join([sys.executable, "-m", "pip", "install", f"moe-lm[{extra}]"])


def end(code: int) -> NoReturn:
    """End the process with this code, or with 1 if its last output cannot be written, without Python's own shutdown.

    After training, a thread of gloo may still be releasing a tensor. If it finds the interpreter shutting down, torch
    aborts the process, and a successful run ends with SIGABRT.
    """
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except BrokenPipeError:
            continue  # the reader has gone away, which is not an error
        except OSError:
            code = code or 1
    os._exit(exit_code(code))


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def open_files() -> int:
    """The files and sockets that this process may still open, its soft limit raised to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS calls its hard limit infinite and takes less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return (1 << 20 if soft == resource.RLIM_INFINITY else soft) - len(os.listdir("/dev/fd"))


def cores() -> int:
    """The processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
