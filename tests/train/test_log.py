"""The log of a run: each step once, and never in training's way (FAULTS row 35)."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.config.run import LogConfig
from moe_lm.train.display import Status, format_seconds
from moe_lm.train.log import LineFile, RunLog, drop_later_steps


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 100, "lr": 3e-4, "grad_norm": 0.5, "tokens_per_second": 1000.0, **more}


def log(run_dir: Path, start_step: int = 0, **more: Any) -> RunLog:
    return RunLog(run_dir, LogConfig(every=10), total_steps=100, title="pretrain", start_step=start_step, **more)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl


def test_every_step_is_a_line(tmp_path: Path) -> None:
    records = [record(step, experts=[{"entropy": 0.5}]) for step in range(1, 6)]
    with log(tmp_path) as metrics:
        for item in records:
            metrics.step(item)
            assert logged(tmp_path)[-1] == item  # on its way to the disk at once
    assert logged(tmp_path) == records


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    with log(tmp_path) as metrics:
        for step in range(1, 16):
            metrics.step(record(step, attempt=1))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')  # torn by a kill
    with log(tmp_path, start_step=10) as metrics:
        for step in range(11, 21):
            metrics.step(record(step, attempt=2))
    assert [(line["step"], line["attempt"]) for line in logged(tmp_path)] == [
        *((step, 1) for step in range(1, 11)),
        *((step, 2) for step in range(11, 21)),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "train.log"]


def test_a_run_from_the_start_forgets_the_old_steps(tmp_path: Path) -> None:
    for _ in range(2):
        with log(tmp_path) as metrics:
            metrics.step(record(1))
    assert len(logged(tmp_path)) == 1


def test_an_event_is_a_line_between_the_steps_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path) as metrics:
        metrics.step(record(1))
        metrics.event("alarm", 1, "layer 3 is dead", layer=3, loss=math.nan)
        metrics.event("skip", 2, "step 2 was skipped", show=False)
    lines = logged(tmp_path)[1:]
    assert all(abs(line.pop("time") - time.time()) < 60 for line in lines)
    assert lines == [
        {"event": "alarm", "step": 1, "message": "layer 3 is dead", "layer": 3, "loss": None},
        {"event": "skip", "step": 2, "message": "step 2 was skipped"},
    ]
    assert capsys.readouterr().out.splitlines()[1:] == ["layer 3 is dead"]
    assert [line.split("  ")[1] for line in (tmp_path / "train.log").read_text().splitlines()][1:] == [
        "layer 3 is dead"
    ]


def test_figures_are_added_to_a_record_that_was_written_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line is shown once, with them; what is written afterwards goes into the same file."""
    with log(tmp_path) as metrics:
        metrics.step(record(9))
        capsys.readouterr()
        metrics.step(record(10), follows=True)
        metrics.event("alarm", 10, "an alarm", show=False)
        assert capsys.readouterr().out == ""
        metrics.amend(10, {"val_loss": 1.5})
        (line,) = capsys.readouterr().out.splitlines()
        assert "val 1.5000" in line
        metrics.event("stop", 10, "the end", show=False)
    found = logged(tmp_path)
    assert found[1] == {**json.loads(json.dumps(record(10))), "val_loss": 1.5}
    assert [line.get("event") for line in found] == [None, None, "alarm", "stop"]


def test_a_resumed_run_keeps_the_events_that_led_to_a_rollback_and_no_other_later_ones(tmp_path: Path) -> None:
    with log(tmp_path) as metrics:
        metrics.step(record(10))
        metrics.event("skip", 12, "skipped")
        metrics.event("rollback", 13, "back to step 10")
        metrics.step(record(11))
        metrics.event("spike", 11, "seen again by the run that goes on")
    with log(tmp_path, start_step=10):
        pass
    assert [(line["step"], line.get("event")) for line in logged(tmp_path)] == [
        (10, None), (12, "skip"), (13, "rollback"),
    ]  # fmt: skip
    with log(tmp_path, start_step=0):
        pass
    assert logged(tmp_path) == []


def test_lines_that_are_no_steps_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n\n[]\nnull\n{}\nnot json\n{"step": "x"}\n{"step": 2}\n')
    with log(tmp_path, start_step=2):
        pass
    assert logged(tmp_path) == [{"step": 1}, {"step": 2}]


def test_not_a_number_becomes_null(tmp_path: Path) -> None:
    with log(tmp_path) as metrics:
        metrics.step(record(1, loss=math.nan, experts=[{"entropy": math.inf}]))
    (line,) = logged(tmp_path)
    assert line["loss"] is None
    assert line["experts"] == [{"entropy": None}]


# What a person sees


def test_plain_lines_every_so_many_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path, start_step=3) as metrics:
        for step in range(4, 101):
            metrics.step(record(step, **({"val_loss": 3.5} if step == 25 else {})))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [4, 10, 20, 25, *range(30, 101, 10)]
    assert lines[0] == "pretrain 4/100  loss 3.9600  lr 3.00e-04  grad 0.50  1,000 tokens/s"
    assert "loss 3.7500  val 3.5000  lr" in lines[3]
    assert lines[4].startswith("pretrain 30/100  loss 3.7000  lr")  # whose held-out loss was not measured
    assert lines[-1] == "pretrain 100/100  loss 3.0000  lr 3.00e-04  grad 0.50  1,000 tokens/s  0s left"
    in_file = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in in_file] == [line.rsplit("\n", 1)[0] for line in lines]


def test_a_message_goes_to_the_person_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path) as metrics:
        metrics.message("evaluating [everything] 字")
    assert capsys.readouterr().out == "evaluating [everything] 字\n"
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith("  evaluating [everything] 字\n")


def test_train_log_grows_over_resumes(tmp_path: Path) -> None:
    for start in (0, 1):
        with log(tmp_path, start_step=start) as metrics:
            metrics.message(f"from {start}")
    assert [line.split("  ")[1] for line in (tmp_path / "train.log").read_text().splitlines()] == ["from 0", "from 1"]


def test_other_ranks_write_and_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path / "not made", is_main=False) as metrics:
        metrics.step(record(1))
        metrics.message("hello")
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.mark.usefixtures("terminal")
def test_a_terminal_gets_a_bar_with_messages_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with log(tmp_path) as metrics:
        assert "0/100" in capsys.readouterr().out  # there before the first step, which may have to compile
        metrics.step(record(1))
        metrics.step(record(100, val_loss=3.25))
        metrics.message("saved [step] 100")
    shown = capsys.readouterr().out
    assert "━" in shown
    assert "100/100" in shown
    assert "loss 3.0000  val 3.2500  lr 3.00e-04  grad 0.50  1,000 tokens/s" in shown
    assert shown.index("saved [step] 100") < shown.rindex("100/100")
    plain = (tmp_path / "train.log").read_text()
    assert "\x1b" not in plain
    assert "━" not in plain


def test_speed_and_time_left_follow_the_recent_steps() -> None:
    status = Status("pretrain", total_steps=1000, start_step=0)
    status.update(record(1, tokens_per_second=1.0), now=100.0)
    assert status.time_left == ""
    for step in range(2, 42):  # a slow start, then 2 seconds a step
        status.update(record(step, tokens_per_second=500.0), now=1000.0 + 2 * step)
    assert status.seconds_left == pytest.approx(2 * (1000 - 41))
    assert "  500 tokens/s" in status.line()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (723, "12m03s"), (3600, "1h00m"), (200_000, "2d07h")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


# Training does not care


class ClosedTerminal(io.StringIO):
    """Standard output after its terminal went away."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    flush = write  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_closed_terminal_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, request: pytest.FixtureRequest
) -> None:
    if kind == "terminal":
        request.getfixturevalue("terminal")
    monkeypatch.setattr(sys, "stdout", ClosedTerminal())
    with log(tmp_path) as metrics:
        for step in range(1, 21):
            metrics.step(record(step))
        metrics.message("still here")
    assert len(logged(tmp_path)) == 20
    assert "still here" in (tmp_path / "train.log").read_text()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A disk that takes no file above `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    file.write("one")
    with largest_file(10), pytest.raises(OSError, match=r"No space left|File too large"):
        file.write("much too long")
    file.write("two")
    file.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\n"


def test_a_full_disk_is_said_once_and_what_is_missing_when_there_is_room_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with log(tmp_path, start_step=1) as metrics:
        metrics.step(record(2))
        with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 5):
            for step in range(3, 9):
                metrics.step(record(step))
        metrics.step(record(9))
        with largest_file((tmp_path / "metrics.jsonl").stat().st_size + 5):
            metrics.step(record(10))
        metrics.step(record(11))
    lines = [line for line in logged(tmp_path) if line.get("file") != "train.log"]
    assert [(line["step"], line.get("event"), line.get("missing")) for line in lines] == [
        (2, None, None), (9, None, None), (9, "log", 6), (11, None, None), (11, "log", 1),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert shown.count("warning: metrics.jsonl could not be written") == 2
    assert "training goes on" in shown
    assert "metrics.jsonl can be written again; lines missing before the newest one: 6" in shown


def test_a_full_disk_that_keeps_the_steps_after_a_rollback_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    with log(tmp_path) as metrics:
        metrics.step(record(9))
        metrics.step(record(10))
        monkeypatch.setattr("moe_lm.train.log.whole_file", full)
        metrics.rewind(9)
        metrics.amend(9, {"val_loss": 1.5})
        monkeypatch.undo()
        metrics.step(record(10))
    assert [line["step"] for line in logged(tmp_path)] == [9, 10, 10]
    out = capsys.readouterr().out
    assert "warning: metrics.jsonl could not be rewritten: [Errno 28] No space left on device" in out
    assert "; steps after 9 are in it twice; training goes on" in out
    assert "; step 9 lacks val_loss; training goes on" in out


def test_a_full_log_disk_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "train.log").symlink_to("/dev/full")
    with log(tmp_path) as metrics:
        for step in range(1, 31):
            metrics.step(record(step))
    assert capsys.readouterr().out.count("warning: train.log could not be written: [Errno 28]") == 1
    assert len(logged(tmp_path)) == 30


def test_a_log_that_cannot_be_opened_is_an_error_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "train.log").mkdir()
    with pytest.raises(UsageError, match=f"cannot write to the logs in {tmp_path}"):
        log(tmp_path).__enter__()


def test_a_full_disk_at_the_start_is_no_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MoeLmError, match=r"cannot write to the logs .*; make room") as raised:
        log(tmp_path).__enter__()
    assert raised.value.exit_code == 1


def test_what_a_model_said_that_was_given_up_does_not_stay(tmp_path: Path) -> None:
    lines = [{"step": step} for step in (1, 2, 3)]
    kinds = ["sample", "tasks", "skip", "rollback"]
    lines += [{"event": kind, "step": 3} for kind in kinds]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    drop_later_steps(path, 2)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("event") for line in kept] == [None, None, "skip", "rollback"]
