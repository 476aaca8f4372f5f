"""A checkpoint of any layout loads bitwise into any other (FAULTS row 4), and its ranks share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

import moe_lm

LAYOUTS = (
    "one process", "2 ranks, EP 2", "4 ranks, EP 2", "4 ranks, uneven, EP 2", "4 ranks, uneven, EP 1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every layout, and `loads`: what became of loading each into each."""
    folder = tmp_path_factory.mktemp("layouts")
    script = str(Path(__file__).parent / "checkpoint_layouts.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(moe_lm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, str(folder)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    (folder / "loads").write_text(done.stdout)
    return folder


@pytest.mark.parametrize("loaded", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_what_one_layout_saves_another_loads_bitwise(folder: Path, saved: str, loaded: str) -> None:
    loads = [json.loads(line) for line in (folder / "loads").read_text().splitlines()]
    found = [load["differ"] for load in loads if (load["saved"], load["loaded"]) == (saved, loaded)]
    ranks = 1 if loaded == "one process" else int(loaded[0])
    assert found == [[]] * ranks


@pytest.mark.parametrize("saved", LAYOUTS)
def test_every_element_is_written_once_and_by_all_ranks(folder: Path, saved: str) -> None:
    elements = 6 * 4 * 3 + 6 * 3 * 5 + 1024 * 8 + 15 + 3 + 10 + 1 + 1
    ranks = 1 if saved == "one process" else int(saved[0])
    for part in ("model", "optimizer"):
        written = [count(path) for path in (folder / saved / "step-00000001" / part).glob("*.safetensors")]
        assert sum(written) == elements
        assert len(written) == ranks
        assert "uneven" in saved or max(written) < 1.1 * elements / ranks


def count(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - it is no dict
