"""Starts of the real program without its imports: one process imports it once and forks for every start.

A child runs `moe_lm.__main__.main` with arguments, environment and output of its own, as a shell would start it. A
child with a `patch` (a function of `tests.faults.patches`) runs it before, to be ill in a way that no file can cause.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.processes import ENVIRONMENT, ROOT

PRELOADED = (
    "moe_lm.cli.main", "moe_lm.train.pretrain", "moe_lm.train.finetune", "moe_lm.generate.sample",
    "moe_lm.engine.torch_engine",
)  # fmt: skip


class Nursery:
    """The process that forks. `start` returns at once."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment,
        )  # fmt: skip

    def start(self, *arguments: object, patch: str = "", **environment: object) -> Started:
        self.count += 1
        output = self.folder / f"output-{self.count}"
        variables = {name: str(value) for name, value in environment.items()}
        pid = self.ask(start=[str(word) for word in arguments], patch=patch, environment=variables, output=str(output))
        return Started(self, int(pid), output)

    def ask(self, **request: object) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Started:
    """A started program, with the methods of `Popen` that tests use."""

    def __init__(self, nursery: Nursery, pid: int, output: Path) -> None:
        self.nursery, self.pid, self.output = nursery, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.nursery.ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"it has not ended after {timeout} s:\n{self.out}{self.err}"
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        return self.out, self.err

    @property
    def out(self) -> str:
        return self._written(".out")

    @property
    def err(self) -> str:
        return self._written(".err")

    def _written(self, suffix: str) -> str:
        file = self.output.with_suffix(suffix)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def serve() -> None:
    """Fork for every line of standard input, until it ends; children that still run are killed then."""
    for name in PRELOADED:
        importlib.import_module(name)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if answer == 0:
                become(request)
            running.add(answer or 0)
        else:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def become(request: dict[str, Any]) -> None:
    """Be the program that the request asks for."""
    try:
        files = [os.open(os.devnull, os.O_RDONLY)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        files += [os.open(request["output"] + suffix, flags, 0o644) for suffix in (".out", ".err")]
        for descriptor, file in enumerate(files):
            os.dup2(file, descriptor)
        os.environ.update(request["environment"])
        from moe_lm import __main__

        sys.argv = [str(__main__.__file__), *request["start"]]
        if request["patch"]:
            patches = importlib.import_module("tests.faults.patches")
            getattr(patches, request["patch"])()
        __main__.main()
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
