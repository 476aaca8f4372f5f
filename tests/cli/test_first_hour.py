"""The inputs of a first hour: what a new user types, and the answer in one sentence."""

from __future__ import annotations

import shlex
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.cli.first_hour import INPUTS, folders
from tests.conftest import MoeLm


@pytest.mark.parametrize("line", INPUTS)
def test_first_hour_input_gets_the_right_answer(
    line: str, tmp_path: Path, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, without a traceback, as wrong use; a hub that is not reached may be there later."""

    def no_network(*args: object, **how: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    typed, *words = (part.strip() for part in line.split(" | "))
    folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = moe_lm(*shlex.split(typed))
    assert done.code == (1 if "cannot be reached" in done.err else 2), done
    *before, said = done.err.splitlines()  # before: what `prepare` begins with
    assert (said.startswith("error: "), done.out, "Traceback" in done.err) == (True, "", False)
    assert [word for word in words if word not in said] == []
    assert not before or typed.startswith("prepare")
