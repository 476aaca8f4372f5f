"""A signal wherever training can be, on the real program; tests/common/test_signals.py has its start."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from moe_lm.common.signals import STOP_SIGNALS
from tests.processes import Start, metrics, runs, wait_until
from tests.runs import last_checkpoint

pytestmark = pytest.mark.slow


def complete(run_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in run_dir.glob("checkpoints/step-*/COMPLETE"))


def steps(run_dir: Path) -> int:
    return len(metrics(run_dir)) if (run_dir / "metrics.jsonl").exists() else 0


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """The last line of a run that a signal stops."""
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (75, "")
    return out.splitlines()[-1]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_in_a_run_that_evaluates_most_of_the_time(
    tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start, number: signal.Signals
) -> None:
    settings = ("train.steps=1000000", "train.eval_every=1", "train.eval_batches=1000", "checkpoint.every=0")
    process = start_moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings)
    wait_until(lambda: steps(tmp_path) >= 3 or not runs(process), "three steps")
    assert stop(process, number).startswith(f"stopped after step {steps(tmp_path)}; ")
    assert complete(tmp_path) == [f"step-{steps(tmp_path):08d}"]
    assert f": {number.name}" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_in_a_save_it_is_finished_and_the_run_goes_on(tiny_pretrain: Path, tmp_path: Path, start_moe_lm: Start) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.steps=1000000", "checkpoint.every=1")
    for _ in range(3):
        process, before = start_moe_lm(*command), steps(tmp_path)
        wait_until(lambda: steps(tmp_path) > before + 2 or not runs(process), "training")  # noqa: B023
        wait_until(lambda: list(tmp_path.glob("checkpoints/*.tmp")) or not runs(process), "a save")  # noqa: B023
        assert stop(process, signal.SIGTERM).startswith(f"stopped after step {steps(tmp_path)}; ")
        assert last_checkpoint(tmp_path).name == complete(tmp_path)[-1] == f"step-{steps(tmp_path):08d}"
        assert not list(tmp_path.glob("checkpoints/*.tmp"))
    assert [record["step"] for record in metrics(tmp_path)] == list(range(1, steps(tmp_path) + 1))
