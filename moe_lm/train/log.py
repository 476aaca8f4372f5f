"""The log of a run: metrics.jsonl, train.log, the trackers and the terminal; and a log of each rank's own."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import torch

import moe_lm
from moe_lm.common.errors import MoeLmError
from moe_lm.common.files import not_writable, whole_file
from moe_lm.config.run import LogConfig
from moe_lm.parallel.topology import Topology
from moe_lm.train.alarms import Alarm, Alarms
from moe_lm.train.display import Display, Status
from moe_lm.train.trackers import Trackers

ROLLBACK = "rollback"  # the event of a return to an earlier checkpoint
PROBES = ("sample", "tasks")  # events that say what the model was, and explain nothing


class RunLog:
    """Writes every step to `metrics.jsonl` and some to `train.log`, and shows the run on the terminal.

    On entering, it drops the steps that a killed process logged after `start_step`, so that the file has each step
    once; a run that starts anew drops all, including the evaluation before its first step. A terminal shows a live
    bar; any other output gets a plain line every `config.every` steps. During the run no write failure stops the
    training: each is reported when it begins, and how many lines it cost when it ends. On ranks other than 0 it does
    nothing.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        total_steps: int,
        title: str,
        start_step: int,
        is_main: bool = True,
        alarms: Alarms | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._start_step = start_step
        self._is_main = is_main
        self._alarms = alarms if config.alarms else None
        self._status = Status(title, total_steps, start_step)
        self._settings = settings or {}
        self._lost: dict[str, int] = {}  # lines that a file did not take, by its name

    def __enter__(self) -> Self:
        if not self._is_main:
            return self
        metrics = self._run_dir / "metrics.jsonl"
        try:
            drop_later_steps(metrics, self._start_step or -1)
            self._trackers = Trackers(self._config, self._run_dir, self._start_step, self._settings, self.message)
            self._metrics = LineFile(metrics)
            self._log = LineFile(self._run_dir / "train.log")
        except OSError as error:
            raise not_writable(f"the logs in {self._run_dir}", error) from error
        self._display = Display(self._status)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if not self._is_main:
            return
        if isinstance(error, MoeLmError):
            self._write_log(f"error: {error}")  # the terminal shows it last
        self._display.close()
        self._trackers.close()
        self._metrics.close()
        self._log.close()

    def has_load(self, step: int) -> bool:
        """Whether the record of a step has the load of each expert, wherever a process began."""
        return step == 1 or step % self._config.every == 0

    def step(self, record: Mapping[str, Any], follows: bool = False) -> None:
        """Write and show the figures of one step, `record["step"]` counted from 1; its line later if more `follows`."""
        if not self._is_main:
            return
        self._status.update(record, time.monotonic())
        self._write(self._metrics, json_text(record))
        self._trackers.log(record["step"], record)
        self._show(self._is_due(record) and not follows)
        if self._alarms:
            self.emit(self._alarms.after(record))

    def amend(self, step: int, figures: Mapping[str, Any]) -> None:
        """Add figures to the record of a step that was written before, and show its line."""
        if not self._is_main:
            return
        self._status.amend(figures)
        if figures:
            self._rewrite(lambda path: add_figures(path, step, figures), f"step {step} lacks {', '.join(figures)}")
        self._trackers.log(step, figures)
        self._show(due=True)

    def _show(self, due: bool) -> None:
        if due:
            self._write_log(self._status.line())
        self._display.step(self._status, due)

    def emit(self, alarms: Iterable[Alarm]) -> None:
        """Write an event for each alarm."""
        for alarm in alarms if self._config.alarms else ():
            name, cure = alarm.symptom.name, alarm.symptom.cure
            self.event("alarm", alarm.step, alarm.text, symptom=name, found=alarm.found, cure=cure)

    def event(self, kind: str, step: int, text: str, /, *, show: bool = True, **fields: Any) -> None:
        """Write what happened in or after `step`: `{"event": kind, "step": ..., "time": ..., "message": text, ...}`.

        It goes to `metrics.jsonl`; if `show`, the text goes to the terminal and to `train.log` too.
        """
        if not self._is_main:
            return
        line = {"event": kind, "step": step, "time": time.time(), "message": text, **fields}
        self._write(self._metrics, json_text(line))
        if kind == "sample":
            self._trackers.sample(step, fields["prompt"], fields["text"])
        elif kind == "tasks":
            self._trackers.log(step, {"tasks": fields["tasks"]})
        if show:
            self.message(text)

    def logged_tokens(self, step: int) -> int:
        """Tokens of the steps up to `step`, by `metrics.jsonl`; 0 on ranks other than 0."""
        if not self._is_main:
            return 0
        with (self._run_dir / "metrics.jsonl").open("rb") as file:
            records = (_read(line) for line in file)
            return sum(found.get("tokens", 0) for found in records if found.get("step", math.inf) <= step)

    def rewind(self, step: int) -> None:
        """Forget the steps after `step`, to which the run has gone back. Trackers receive the repeated steps twice."""
        if self._is_main:
            self._start_step = step
            self._status.rewind(step)
            self._rewrite(lambda path: drop_later_steps(path, step), f"steps after {step} are in it twice")

    def move_last_step(self, step: int) -> None:
        """The run ends after another step than was thought."""
        self._status.total_steps = step

    def message(self, text: str) -> None:
        """Write a line to the terminal and to `train.log`."""
        if self._is_main:
            self._write_log(text)
            self._display.message(text)

    def _is_due(self, record: Mapping[str, Any]) -> bool:
        step = record["step"]
        edge = step in (self._start_step + 1, self._status.total_steps)
        return edge or step % self._config.every == 0 or "val_loss" in record

    def _write_log(self, text: str) -> None:
        stamp = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._write(self._log, f"{stamp}  {text}")

    def _write(self, file: LineFile, line: str) -> None:
        """Append a line. Training survives a full disk; that it is full is said once, and the loss when it has room."""
        lost = self._lost.get(file.name, 0)
        try:
            file.write(line)
        except OSError as error:
            self._lost[file.name] = lost + 1
            if not lost:
                self.message(f"warning: {file.name} could not be written: {error}; training goes on")
            return
        if lost:
            del self._lost[file.name]
            text = f"{file.name} can be written again; lines missing before the newest one: {lost}"
            self.event("log", self._status.step, text, file=file.name, missing=lost)

    def _rewrite(self, change: Callable[[Path], object], otherwise: str) -> None:
        """Change `metrics.jsonl`; a full disk leaves it as it was, and what that means is said."""
        try:
            self._metrics.rewrite(change)
        except OSError as error:
            name = self._metrics.name
            self.message(f"warning: {name} could not be rewritten: {error}; {otherwise}; training goes on")


@contextmanager
def rank_log(topology: Topology, run_dir: Path) -> Iterator[None]:
    """Write `logs/rank-00003.log` in the run folder: where the rank ran, and the traceback of its error.

    A single process has none. Raises MoeLmError if the file cannot be written.
    """
    if topology.world_size == 1:
        yield
        return
    path = rank_log_path(topology, run_dir)
    versions = f"moe_lm {moe_lm.__version__}, torch {torch.__version__}, python {sys.version.split()[0]}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = LineFile(path)
        file.write(f"{_now()} started on {socket.gethostname()}, process {os.getpid()}, {topology}, {versions}")
    except OSError as error:
        raise MoeLmError(
            f"cannot write {path}: {error.strerror}; make the run folder writable on every host"
        ) from error
    ending = "ended"
    try:
        yield
    except BaseException:
        ending = traceback.format_exc().rstrip()
        raise
    finally:
        try:
            file.write(f"{_now()} {ending}")
        except OSError as error:  # a full disk must not hide the error, nor fail a run that went well
            print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
        file.close()


def rank_log_path(topology: Topology, run_dir: Path) -> Path:
    return run_dir / "logs" / f"rank-{topology.rank:05d}.log"


class LineFile:
    """Appends whole lines without a buffer; a line that does not fit leaves nothing behind."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name
        self._file = path.open("ab", buffering=0)

    def write(self, line: str) -> None:
        """Raises OSError if the line cannot be written whole, after removing the part that was."""
        content = f"{line}\n".encode(errors="backslashreplace")
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(before)
            raise

    def rewrite(self, change: Callable[[Path], object]) -> None:
        """Let `change` put another file in its place. Raises OSError, as on a full disk, which leaves it as it was."""
        change(self._path)
        file = self._path.open("ab", buffering=0)
        self.close()
        self._file = file

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


def drop_later_steps(path: Path, last_step: int) -> None:
    """Rewrite a `metrics.jsonl` without the lines of steps after `last_step`, and without torn lines.

    Events later than `last_step`, but for PROBES, stay if they led to a rollback, which the run that goes on does not
    repeat. A run without a step (`last_step` below 0) keeps nothing.
    """
    if not path.exists():
        return
    with whole_file(path) as kept, path.open("rb") as old, kept.open("wb") as new:
        rollback = max((number for number, line in enumerate(old) if _read(line).get("event") == ROLLBACK), default=-1)
        old.seek(0)
        for number, line in enumerate(old):
            found = _read(line)
            explains = number <= rollback and found.get("event", "sample") not in PROBES and last_step >= 0
            if explains or found.get("step", math.inf) <= last_step:
                new.write(line)


def add_figures(path: Path, step: int, figures: Mapping[str, Any]) -> None:
    """Rewrite a `metrics.jsonl` with figures added to the record of a step."""
    with whole_file(path) as kept, path.open("rb") as old, kept.open("wb") as new:
        for line in old:
            found = _read(line)
            if found.get("step") == step and "event" not in found:
                line = f"{json_text(found | dict(figures))}\n".encode()
            new.write(line)


def _read(line: bytes) -> dict[str, Any]:
    """A line of `metrics.jsonl`; empty for one that is torn or has no step."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), (int, float)) else {}


def json_text(values: Mapping[str, Any]) -> str:
    """The values as JSON on one line, with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(values))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
