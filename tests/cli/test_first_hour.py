"""The inputs of a first hour: what a new user types, and the answer in one sentence."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.first_hour import INPUTS, folders
from tests.conftest import MoeLm


@pytest.mark.parametrize("line", INPUTS)
def test_first_hour_input_gets_the_right_answer(
    line: str, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exit code 2, in one line, without a traceback."""
    typed, *words = (part.strip() for part in line.split(" | "))
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = moe_lm(*shlex.split(typed))
    assert done.code == 2, done
    assert (done.err.count("\n"), done.err.startswith("error: "), done.out) == (1, True, "")
    assert [word for word in words if word not in done.err] == []
