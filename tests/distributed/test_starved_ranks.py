"""Ranks whose experts get no token: the exchange completes, and their gradients are zero, not None (FAULTS row 23)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(world_size: int, engine: str) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    program = [sys.executable, str(Path(__file__).with_name("starved_ranks.py")), engine]
    ranks = []
    for rank in range(world_size):
        variables = {**shared, "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": ROOT}
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        ranks.append(subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment))
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size
    found: dict[str, Any] = json.loads(outputs[0])
    return found


def test_a_rank_without_tokens_takes_part() -> None:
    expected, found = run(1, "torch"), run(4, "deepspeed")
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, norms in expected["gradients"].items():
        assert found["gradients"][name] == pytest.approx(norms, rel=1e-5)
        assert all(norm > 0 for norm in norms[:2])
        assert found["gradients"][name][2:] == [0.0] * 6
