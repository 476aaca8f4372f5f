"""Runs in processes of their own, as a launcher starts them, and the figures they write."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_lm.common.signals import STOP_SIGNALS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

Start = Callable[..., subprocess.Popen[str]]  # the fixture `start_moe_lm`


@contextmanager
def one_thread_here() -> Iterator[None]:
    """Compute on one thread: tiny products gain nothing from more, and lose much when the machine is busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The variables that torchrun gives a process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1"}


def start_ranks(start: Start, world_size: int, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start `moe-lm` with these arguments as this many ranks."""
    port = free_port()
    return [start(*arguments, **rank_environment(rank, world_size, port)) for rank in range(world_size)]


def layout(expert_parallel_size: int, zero_stage: int) -> tuple[str, ...]:
    """The settings of a sharded layout."""
    return (
        "parallel.engine=deepspeed",
        f"parallel.expert_parallel_size={expert_parallel_size}",
        f"parallel.zero_stage={zero_stage}",
    )


def start_program(world_size: int, program: Path, *arguments: object) -> list[subprocess.Popen[str]]:
    """Start a Python file with these arguments as this many ranks."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | rank_environment(rank, world_size, port),
        )
        for rank in range(world_size)
    ]


def wait_until(
    condition: Callable[[], object], what: str, instead: Callable[[], object] = str, seconds: float = 120
) -> None:
    """Poll; `instead` says what there is instead, when it did not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what} {instead()}"
        time.sleep(0.01)


def runs(process: subprocess.Popen[str]) -> bool:
    """True for a process that has not ended; fails, with its output, for one that has."""
    assert process.poll() is None, process.communicate()
    return True


def hears_signals(pid: int) -> bool:
    """Whether the process has handlers for the stop signals, as the kernel sees it."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    (caught,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt")]
    return all(caught >> number - 1 & 1 for number in STOP_SIGNALS)


def finish(processes: list[subprocess.Popen[str]], code: int = 0, seconds: float = 120) -> list[str]:
    """The output of each rank; all end with `code`, and none writes to stderr."""
    outputs = [process.communicate(timeout=seconds) for process in processes]
    assert [(process.returncode, err) for process, (_, err) in zip(processes, outputs, strict=True)] == [
        (code, "") for _ in processes
    ]
    return [out for out, _ in outputs]


def train_alone(config: Path, run_dir: Path, *settings: str) -> Path:
    """Pretrain in one process, undisturbed; returns the run's folder."""
    command = [sys.executable, "-m", "moe_lm", "pretrain", str(config), f"run_dir={run_dir}", *settings]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | ENVIRONMENT)
    return run_dir


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The figures of every step."""
    return [line for line in logged(run_dir) if "event" not in line]


def events(run_dir: Path, kind: str = "") -> list[dict[str, Any]]:
    """The events between the steps, of one kind or of all."""
    return [line for line in logged(run_dir) if "event" in line and kind in ("", line["event"])]


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The losses of all steps that were logged; each step is logged once, even if it was trained again."""
    lines = metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
