"""The signals that stop a run, wherever the program is, and the second one, which ends it at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_lm.common.signals import STOP_SIGNALS, stop_signals
from tests.conftest import pytest_configure
from tests.processes import ENVIRONMENT, ROOT, Start, hears_signals, wait_until

WAITING = (
    "import sys, time\n"
    "from moe_lm.common.signals import stop_signals\n"
    "with stop_signals() as signals:\n"
    "    print('ready', flush=True)\n"
    "    while not signals: time.sleep(0.01)\n"
    "    print(*signals, flush=True)\n"
    "    time.sleep(600)\n"
)
NOTHING_TO_SAVE = "stopped before the first step; nothing to save\n"
LIBTORCH = "libtorch_cpu"


@contextmanager
def waiting(ignored: tuple[signal.Signals, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process that waits for a signal, started where some are ignored."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    command, environment = [sys.executable, "-c", WAITING], os.environ | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=ignore) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            yield child
        finally:
            child.kill()


def hears(process: subprocess.Popen[str]) -> bool:
    return hears_signals(process.pid)


def loads_torch(process: subprocess.Popen[str]) -> bool:
    return LIBTORCH in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")


def stopped(
    process: subprocess.Popen[str], number: signal.Signals, when: Callable[[subprocess.Popen[str]], bool]
) -> tuple[int, str, str]:
    """The exit code and the output of a process that gets a signal at a certain time."""
    wait_until(lambda: when(process), "the time for the signal")
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


# At the start


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_training_that_has_not_begun_ends_at_once(number: signal.Signals, start_moe_lm: Start, tmp_path: Path) -> None:
    """Before anything but the handlers was imported; the config is not even read."""
    process = start_moe_lm("pretrain", tmp_path / "none.yaml")
    assert stopped(process, number, hears) == (75, "", NOTHING_TO_SAVE)


@pytest.mark.parametrize("verb", ["pretrain", pytest.param("finetune", marks=pytest.mark.slow)])
def test_training_that_imports_torch_ends_at_once(
    verb: str, start_moe_lm: Start, tiny_pretrain: Path, finetune_config: Path, tmp_path: Path
) -> None:
    config = tiny_pretrain if verb == "pretrain" else finetune_config
    process = start_moe_lm(verb, config, f"run_dir={tmp_path / 'run'}")
    assert stopped(process, signal.SIGTERM, loads_torch) == (75, "", NOTHING_TO_SAVE)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_another_verb_is_interrupted(number: signal.Signals, start_moe_lm: Start) -> None:
    code, _, err = stopped(start_moe_lm("doctor"), number, hears)
    assert (code, err) == (128 + number, f"interrupted by {number.name}\n")


def test_a_verb_that_goes_on_says_so(start_moe_lm: Start, tmp_path: Path) -> None:
    code, _, err = stopped(start_moe_lm("quickstart", "--run-dir", tmp_path), signal.SIGINT, hears)
    assert (code, err) == (75, "interrupted by SIGINT; the same command goes on\n")


def test_an_import_is_finished_before_the_verb_is_interrupted(tmp_path: Path) -> None:
    """Some imports swallow the exception, and the verb would go on with half a module, as with torch's of numpy."""
    (tmp_path / "careless.py").write_text(
        "import time\n"
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    whole = True\n"
        "except BaseException: pass\n"
    )
    program = (
        "from moe_lm.common.signals import ended_by_exception\n"
        "with ended_by_exception():\n"
        "    import careless, time\n"
        "    assert careless.whole\n"
        "    time.sleep(600)\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command, environment = [sys.executable, "-c", program], os.environ | ENVIRONMENT | path
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert stopped(child, signal.SIGTERM, hears) == (143, "", "interrupted by SIGTERM\n")


def test_a_signal_is_heard_within_a_long_call_of_a_library() -> None:
    """The main thread is in a call that never returns to Python, as to a tokenizer's trainer, and says nothing."""
    program = (
        "import ctypes\n"
        "from moe_lm.common import signals\n"
        "signals.PATIENCE_SECONDS = 0.1\n"
        "with signals.ended_by_exception():\n"
        "    print('ready', flush=True)\n"
        "    mutex = ctypes.create_string_buffer(64)\n"
        "    while True: ctypes.CDLL(None).pthread_mutex_lock(mutex)\n"  # the second time for ever, signals or not
    )
    command, environment = [sys.executable, "-c", program], os.environ | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert stopped(child, signal.SIGTERM, hears) == (143, "", "interrupted by SIGTERM\n")


# In training


@pytest.mark.parametrize(
    ("inside", "code", "said"),
    [
        ("", 75, NOTHING_TO_SAVE),
        ("with stop_signals() as signals: signals.defer()", 75, "stopped after the last save\n"),
        ("with suppress(OSError), stop_signals(): raise OSError", 143, ""),
    ],
)
def test_outside_the_loop_a_signal_ends_training_at_once(inside: str, code: int, said: str) -> None:
    program = (
        "import time; from contextlib import suppress\n"
        "from moe_lm.common.signals import ended_at_once, stop_signals\n"
        "with ended_at_once():\n"
        f"    {inside or 'pass'}\n"
        "    print('ready', flush=True); time.sleep(600)\n"
    )
    command, environment = [sys.executable, "-c", program], os.environ | ENVIRONMENT
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert stopped(child, signal.SIGTERM, hears) == (code, "", said)


def test_the_first_step_ends_at_once_and_the_next_is_finished() -> None:
    """Compiling takes minutes, and there is nothing to save; under `ended_at_once` alone, so not in these tests."""
    program = WAITING.replace("with stop", "with ended_at_once(), stop").replace(
        "import stop", "import ended_at_once, stop"
    )
    for hold, code in (("", 75), ("    signals.defer()\n", None)):
        with subprocess.Popen(
            [sys.executable, "-c", program.replace("    print('ready'", f"{hold}    print('ready'")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT,
        ) as child:  # fmt: skip
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGTERM)
            if code is None:
                assert child.stdout.readline() == "15\n"
                child.kill()
            else:
                assert child.wait(timeout=60) == code


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    with waiting() as child:
        assert child.stdout is not None
        child.send_signal(signal.SIGTERM)
        assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"
        time.sleep(0.6)
        child.send_signal(second)
        assert child.wait(timeout=60) == 128 + second


def test_one_event_that_sends_several_signals_is_one() -> None:
    """As timeout(1) signals its child and then the group, and a terminal that closes does by way of its shell too."""
    with waiting() as child:
        assert child.stdout is not None
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            child.send_signal(number)
            time.sleep(0.05)
        time.sleep(0.6)
        child.send_signal(signal.SIGHUP)
        assert child.stdout.readline() == f"{int(signal.SIGHUP)}\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=0.3)
        child.send_signal(signal.SIGUSR1)
        assert child.wait(timeout=60) == 128 + signal.SIGUSR1


def test_what_was_ignored_at_the_start_stays_ignored() -> None:
    """SIGHUP under nohup, SIGINT in the background of a script; not SIGTERM, with which schedulers stop."""
    with waiting(ignored=STOP_SIGNALS) as child:
        assert child.stdout is not None
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            child.send_signal(number)
            time.sleep(0.05)
        assert child.stdout.readline() == f"{int(signal.SIGTERM)}\n"


def test_tests_in_the_background_hear_ctrl_c() -> None:
    """`nohup bash launch/test.sh &` ignores it, and so would every process that a test starts."""
    program = "import signal; print([signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGHUP)])"
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        pytest_configure()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[False, False]\n"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_spares_the_processes_that_training_starts() -> None:
    """A terminal sends SIGINT to every process; compilers of `torch.compile` that die of it would fail the step."""
    program = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    with stop_signals():
        inside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    outside = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(json.loads(inside.stdout)) >= {*STOP_SIGNALS}
    assert not set(json.loads(outside.stdout)) & {*STOP_SIGNALS}


def test_a_signal_that_is_not_for_stopping_stops_nothing() -> None:
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with stop_signals() as received:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.2)
            assert list(received) == []
    finally:
        signal.signal(signal.SIGUSR2, before)
