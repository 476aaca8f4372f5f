"""The GPU day: a part that fails, hangs or cannot run costs itself alone; with tiny shapes every part runs here."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOUSE = Path(__file__).parents[2]
NOTE = """
import json, pathlib, sys
def note(**figures):
    pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(figures))
"""  # as `note` of eval/gpu/common.py, without its imports


def day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **scripts: str) -> dict[str, Any]:
    """The summary of a day whose parts are these scripts."""
    found = runpy.run_path(str(HOUSE / "eval/gpu/day.py"))
    (tmp_path / "parts").mkdir()
    for name, script in scripts.items():
        (tmp_path / "parts" / f"{name}.py").write_text(script, encoding="utf-8")
    module = found["main"].__globals__
    parts = tuple(found["Part"](name, 1.0, "nothing") for name in scripts)
    for name, value in {"HERE": tmp_path, "PARTS": parts, "LEAST": 5.0}.items():
        monkeypatch.setitem(module, name, value)
    monkeypatch.setattr(sys, "argv", ["day.py", "--tiny", "--minutes", "0.01", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        found["main"]()
    summary: dict[str, Any] = json.loads((tmp_path / "out/summary.json").read_text("utf-8"))
    return summary


def test_a_part_that_fails_or_hangs_costs_itself_alone_and_keeps_its_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = day(
        monkeypatch,
        tmp_path,
        fails=f"{NOTE}note(speed=7)\nraise SystemExit('no such kernel')",
        skips=f"{NOTE}note(skipped='no CUDA device')",
        hangs="import time\ntime.sleep(1000)",
        works=f"{NOTE}note(speed=8)",
    )
    assert {name: found[name]["outcome"] for name in ("fails", "skips", "hangs", "works")} == {
        "fails": "failed", "skips": "skipped", "hangs": "failed", "works": "done",
    }  # fmt: skip
    assert json.loads((tmp_path / "out/fails.json").read_text("utf-8")) == {"speed": 7, "failed": "no such kernel"}
    assert found["hangs"]["why"] == "not done after 5 s"


@pytest.mark.slow
def test_every_part_runs_with_tiny_shapes(tmp_path: Path) -> None:
    command = ["bash", "eval/gpu/run.sh", "--tiny", "--minutes", "4", "--out", str(tmp_path)]
    environment = {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=HOUSE, env={**os.environ, **environment}, check=False)
    found = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    outcomes = {name: part["outcome"] for name, part in found.items() if isinstance(part, dict)}
    assert done.returncode == 0, found
    assert outcomes.pop("cuda_tests") == "skipped"
    assert set(outcomes.values()) == {"done"}
