"""Fixtures of the faults: a program to start, a small run to harm, and the means to harm it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.nursery import Nursery, Started
from tests.processes import free_port, rank_environment

SHORT = ("train.steps=60", "checkpoint.every=20", "train.eval_every=0", "train.micro_batch_size=2")
Program = Callable[..., Started]


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"), **preloaded(tmp_path_factory.mktemp("harm")))
    yield nursery
    nursery.close()


@pytest.fixture
def program(nursery: Nursery) -> Iterator[Program]:
    """Starts `moe-lm`; whatever still runs at the end of the test is killed."""
    started: list[Started] = []

    def start(*arguments: object, patch: str = "", **environment: object) -> Started:
        started.append(nursery.start(*arguments, patch=patch, **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def start_ranks(
    program: Program, world_size: int, *arguments: object, patch: str = "", **more: object
) -> list[Started]:
    """The ranks of a run, each with the variables that a launcher gives it."""
    port = free_port()
    return [
        program(*arguments, patch=patch, **rank_environment(rank, world_size, port), **more)
        for rank in range(world_size)
    ]


def done(process: Started, code: int = 0) -> Started:
    """The program when it has ended, with this exit code."""
    assert process.wait() == code, process.out + process.err
    return process


@pytest.fixture(scope="session")
def whole(nursery: Nursery, tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 60 steps that nothing disturbed, with all its checkpoints: 20, 40 and 60."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done(nursery.start("pretrain", tiny_pretrain, f"run_dir={run_dir}", *SHORT, "checkpoint.keep=9"))
    return run_dir


@pytest.fixture
def broken_off(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run as it was after step 40, when it was killed."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000060")
    return run_dir


def steps(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are steps."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [line for line in map(json.loads, lines) if "event" not in line and "loss" in line]


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.get("event") == kind]


def losses_of(run_dir: Path) -> list[float]:
    """The loss of every step; each step is there once, in order."""
    found = steps(run_dir)
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [line["loss"] for line in found]


def preloaded(folder: Path) -> dict[str, str]:
    """The environment that lets `harm.c` stand between a program and its files; nothing without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return {}
    library, source = folder / "harm.so", Path(__file__).parent / "harm.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


@pytest.fixture
def harm() -> Callable[..., dict[str, object]]:
    """The environment of a program that is to be harmed: `mode`, `under` a folder, `at` an operation."""
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("there is no C compiler for tests/faults/harm.c")
    return lambda **how: {f"HARM_{name.upper()}": value for name, value in how.items()}
