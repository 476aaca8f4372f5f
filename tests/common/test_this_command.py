"""What is typed to go on, and which signals stop a run."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from moe_lm.train.loop import stop_signals, this_command


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


def test_a_signal_that_is_not_for_stopping_stops_nothing() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stop_signals() as received:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.2)
            assert list(received) == []
    finally:
        signal.signal(signal.SIGUSR1, before)
