"""The command that starts a run again, and the end of a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lm.common.exits import LAUNCHER
from moe_lm.common.process import this_command, to_type
from moe_lm.parallel.launch import reasons


def test_this_command_is_what_a_person_would_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name where the shell finds it, else a path that runs without an activated environment."""
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    for program, path, typed in (
        ("/somewhere/bin/moe-lm", "/nothing", "/somewhere/bin/moe-lm"),
        ("/bin/sh", "/bin", "sh"),
        ("/somewhere/moe_lm/__main__.py", "/bin", "/venv/bin/python -m moe_lm"),
    ):
        monkeypatch.setenv("PATH", path)
        monkeypatch.setattr(sys, "argv", [program, "pretrain", "my runs/a.yaml", "train.steps=10"])
        assert this_command() == f"{typed} pretrain 'my runs/a.yaml' train.steps=10"
        assert to_type("eval", Path("my runs/a")) == f"{typed} eval 'my runs/a'"


def test_a_launcher_is_told_on_a_full_disk_too(tmp_path: Path) -> None:
    """Such a disk still takes the names of files, as under a limit of 0 bytes."""
    program = (
        "import resource, sys; from moe_lm.common.exits import exit_code\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "print(exit_code(int(sys.argv[1])))"
    )

    def said(code: int) -> tuple[int, list[int]]:
        environment = os.environ | {LAUNCHER: str(tmp_path), "RANK": "0"}
        done = subprocess.run([sys.executable, "-c", program, str(code)], stdout=subprocess.PIPE, env=environment)
        return int(done.stdout), reasons(tmp_path)

    assert said(75) == (0, [75])
    assert said(2) == (0, [2])
    assert said(1) == (1, [])
    assert said(0) == (0, [])


@pytest.mark.parametrize(("device", "code"), [("/dev/full", 1), ("/dev/null", 0)])
def test_a_process_whose_last_output_is_lost_fails(device: str, code: int) -> None:
    program = (
        "import sys; from moe_lm.common.process import end\n"
        "sys.stdout = open(1, 'w', closefd=False)  # buffered, whatever PYTHONUNBUFFERED says\n"
        "sys.stdout.write('said'); end(0)"
    )
    with open(device, "w", encoding="utf-8") as output:
        assert subprocess.run([sys.executable, "-c", program], stdout=output).returncode == code
