"""The signals that stop a run, and the second one, which ends it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from moe_lm.common.signals import stop_signals
from tests.processes import ENVIRONMENT

WAITING = (
    "import sys, time\n"
    "from moe_lm.common.signals import stop_signals\n"
    "with stop_signals() as signalled:\n"
    "    print('ready', flush=True)\n"
    "    while not signalled: time.sleep(0.01)\n"
    "    print(*signalled, flush=True)\n"
    "    time.sleep(600)\n"
)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    command, environment = [sys.executable, "-c", WAITING], os.environ | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        child.send_signal(second)
        assert child.wait(timeout=60) == 128 + second


def test_ctrl_c_spares_the_processes_that_training_starts() -> None:
    """A terminal sends SIGINT to every process; compilers of `torch.compile` that die of it would fail the step."""
    program = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    with stop_signals():
        inside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    outside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(json.loads(inside.stdout)) >= {signal.SIGTERM, signal.SIGINT}
    assert not set(json.loads(outside.stdout)) & {signal.SIGTERM, signal.SIGINT}


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
