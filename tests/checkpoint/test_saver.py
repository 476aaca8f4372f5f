"""Saving in the background: the state of its step, never two at a time, errors told at the next step (FAULTS 11-13)."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_lm.checkpoint import checkpoint, read, write
from moe_lm.checkpoint.saver import NICENESS, Saver
from moe_lm.common.errors import MoeLmError
from moe_lm.config.run import CheckpointConfig
from moe_lm.data.batches import BatchSource
from moe_lm.parallel.watch import Watchdog
from tests.loops import LoopRun, Watched

pytestmark = pytest.mark.usefixtures("one_thread")


class Disk:
    """Holds up every save at its beginning until it is `free`, and counts; `error` is what writing then raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.begun = threading.Event(), threading.Event()
        self.writers, self.most_writers, self.saves = 0, 0, 0
        self.error: Callable[[int], Exception | None] = lambda save: None
        self.real_save = write.save
        monkeypatch.setattr(write, "save", self.save)

    def save(self, checkpoints: Path, step: int, *more: object) -> Path:
        self.writers += 1
        self.saves += 1
        self.most_writers = max(self.most_writers, self.writers)
        self.begun.set()
        try:
            assert self.free.wait(timeout=60)
            error = self.error(step)
            if error is not None:
                raise error
            return self.real_save(checkpoints, step, *more)  # type: ignore[arg-type]
        finally:
            self.writers -= 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.free.set()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(60)


def state_of(value: int) -> dict[str, Tensor]:
    tensor = torch.full((6, 5), float(value))
    return {"model.weight": tensor, "model.tied": tensor, "exp_avg.weight": -tensor.T, "step": torch.tensor(value)}


def loaded(folder: Path) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}
    read.load(folder, state)
    return state


def in_background(keep: int = 9, every: int = 0) -> CheckpointConfig:
    return CheckpointConfig(background=True, keep=keep, every=every)


# The saver


def test_what_is_saved_is_the_state_at_the_start_of_the_save(tmp_path: Path, disk: Disk) -> None:
    state = state_of(1)
    with Saver(tmp_path, in_background()) as saver:
        saver.start(1, state, {"trainer.json": "1"})
        for tensor in state.values():
            tensor.add_(100)  # training goes on
        assert saver.outcomes() == []
        assert checkpoint.latest(tmp_path) is None
        disk.free.set()
        saver.wait()
        assert [(saved.step, saved.folder, saved.error) for saved in saver.outcomes()] == [
            (1, tmp_path / "step-00000001", None)
        ]
        assert saver.outcomes() == []
    for name, tensor in loaded(tmp_path / "step-00000001").items():
        assert torch.equal(tensor, state_of(1)[name]), name


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_what_trains_goes_before_what_saves(tmp_path: Path, disk: Disk) -> None:
    disk.free.set()
    own, seen = os.getpriority(os.PRIO_PROCESS, 0), list[int]()
    disk.error = lambda step: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    with Saver(tmp_path, in_background()) as saver:
        saver.start(1, state_of(1), {})
        saver.wait()
        saver.save(2, state_of(2), {})  # which training waits for
    assert seen == [max(own, NICENESS), own]


def test_a_second_save_waits_for_the_first_and_old_ones_go(tmp_path: Path, disk: Disk) -> None:
    with Saver(tmp_path, in_background(keep=2)) as saver:
        for step in (1, 2, 3):
            threading.Timer(0.1, disk.free.set).start()
            saver.start(step, state_of(step), {})
        folder = saver.save(4, state_of(4), {})
        assert [saved.step for saved in saver.outcomes()] == [1, 2, 3]
    assert (disk.saves, disk.most_writers) == (4, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert torch.equal(loaded(folder)["step"], torch.tensor(4))


class Places(Watchdog):
    """Counts the places that a rank goes through, as the watchdogs of all ranks compare them."""

    moves = 0

    def at(self, phase: str, step: int | None = None) -> None:
        self.moves += 1


def test_a_rank_goes_through_the_same_places_whenever_its_save_ends(tmp_path: Path, disk: Disk) -> None:
    """The save of one rank has ended when outcomes are asked for, that of another only when all wait for it."""
    disk.free.set()
    moves = []
    for ends_early in (True, False):
        watchdog = Places()
        with Saver(tmp_path / str(ends_early), in_background(), watchdog) as saver:
            if not ends_early:
                disk.free.clear()
            saver.start(1, state_of(1), {})
            if ends_early:
                while not saver.outcomes():
                    time.sleep(0.01)
            else:
                assert saver.outcomes() == []
            training = watchdog.moves  # both train on from here
            disk.free.set()
            saver.start(2, state_of(2), {})
            saver.save(3, state_of(3), {})
        moves.append((training, watchdog.moves))
    assert moves[0] == moves[1]
    assert 0 < moves[0][0] < moves[0][1]


def test_an_error_of_the_writing_thread_is_told(tmp_path: Path, disk: Disk) -> None:
    disk.free.set()
    disk.error = lambda step: {1: MoeLmError("disk full"), 3: RuntimeError("a fault")}.get(step)
    with Saver(tmp_path, in_background()) as saver:
        saver.start(1, state_of(1), {})
        saver.start(2, state_of(2), {})
        saver.wait()
        first, second = saver.outcomes()
        assert (first.step, first.folder, str(first.error)) == (1, None, "disk full")
        assert (second.step, second.error) == (2, None)
        saver.start(3, state_of(3), {})
        with pytest.raises(RuntimeError, match="a fault"):  # no policy knows it, so it ends the run
            saver.wait()


def test_a_save_that_cannot_end_does_not_keep_a_failed_run(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lm.checkpoint.saver.PATIENCE_SECONDS", 0.1)

    def fail() -> None:
        with Saver(tmp_path, in_background()) as saver:
            saver.start(1, state_of(1), {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert disk.writers == 1
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "checkpoint")


# A full disk


class FullDisk:
    """Has room for so many checkpoints; a save beyond that fails as the operating system lets it fail."""

    def __init__(self, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checkpoints, self.room, self.attempts, self.error = checkpoints, 9, 0, errno.ENOSPC
        self.sync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        if len(list(self.checkpoints.glob("step-*"))) > self.room:
            self.attempts += 1
            raise OSError(self.error, os.strerror(self.error))
        self.sync(descriptor)


@pytest.fixture
def full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    monkeypatch.setattr("moe_lm.checkpoint.saver.RETRY_SECONDS", 0)
    return FullDisk(tmp_path, monkeypatch)


def test_older_checkpoints_give_way_to_the_last_one(tmp_path: Path, full_disk: FullDisk) -> None:
    told: list[str] = []
    with Saver(tmp_path, CheckpointConfig(keep=9)) as saver:
        for step in (1, 2, 3):
            saver.save(step, state_of(step), {})
        full_disk.room = 2
        folder = saver.save(4, state_of(4), {}, tell=told.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    assert torch.equal(loaded(folder)["step"], torch.tensor(4))
    assert told == ["the disk is full: gave up step-00000001, step-00000002 for the checkpoint of step 4"]


def test_the_last_save_is_tried_again_until_the_disk_has_room(tmp_path: Path, full_disk: FullDisk) -> None:
    """The newest complete checkpoint never gives way."""
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            full_disk.room = 9  # somebody has made room

    with Saver(tmp_path, CheckpointConfig(keep=9)) as saver:
        saver.save(1, state_of(1), {})
        full_disk.room = 1
        saver.save(2, state_of(2), {}, is_over=lambda: False, tell=tell)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    assert len(told) == 3
    assert "No space left on device" in told[0]
    assert "trying again every 0 s until it succeeds or a signal ends the run" in told[0]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_signal_ends_the_trying_with_an_error_that_names_what_is_kept(
    tmp_path: Path, full_disk: FullDisk, error: int
) -> None:
    told: list[str] = []
    with Saver(tmp_path, CheckpointConfig(keep=9)) as saver:
        saver.save(1, state_of(1), {})
        full_disk.room, full_disk.error = 1, error
        with pytest.raises(MoeLmError, match=r"step-00000002: .*without it, kept: .*step-00000001$"):
            saver.save(2, state_of(2), {}, is_over=lambda: len(told) == 2, tell=told.append)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert len(told) == 2


def test_older_checkpoints_give_way_to_a_save_under_way_at_the_second_time(tmp_path: Path, full_disk: FullDisk) -> None:
    """The first time training goes on, and nothing is given up: the disk may have room again."""
    with Saver(tmp_path, CheckpointConfig(keep=9)) as saver:
        for step in (1, 2):
            saver.save(step, state_of(step), {})
        full_disk.room = 2
        for step in (3, 4):
            saver.start(step, state_of(step), {})
        saver.wait()
        first, second = saver.outcomes()
    assert "No space left" in str(first.error)
    assert first.given_up == ()
    assert (second.error, second.given_up) == (None, ("step-00000001",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


# The loop


def background_run(folder: Path, ragged: BatchSource, background: bool = True) -> LoopRun:
    """Six steps with a checkpoint after every second one."""
    return LoopRun(folder, Watched(ragged), validation=[], save_every=2, keep=9, background=background)


def saved(run: LoopRun, name: str) -> dict[str, Tensor]:
    state = {key: torch.zeros_like(tensor) for key, tensor in run.state.items()}
    read.load(run.folder / "checkpoints" / name, state)
    return state


@pytest.fixture
def run(tmp_path: Path, ragged: BatchSource) -> LoopRun:
    return background_run(tmp_path / "run", ragged)


def steps(*numbers: int) -> list[str]:
    return [f"step-{number:08d}" for number in numbers]


def test_training_goes_on_and_the_checkpoints_are_those_of_a_run_that_waits(
    run: LoopRun, tmp_path: Path, ragged: BatchSource, disk: Disk
) -> None:
    waiting = background_run(tmp_path / "waiting", ragged, background=False)
    disk.free.set()
    waiting()
    disk.free.clear()
    seen = []

    def at(step: int) -> None:
        if step == 3:  # the fourth step, whose save must wait for that of the second
            seen.append((disk.begun.is_set(), disk.writers, run.checkpoints))
            threading.Timer(0.2, disk.free.set).start()

    disk.begun.clear()
    run.source.at = at
    run()
    assert seen == [(True, 1, [])]
    assert disk.most_writers == 1
    assert run.checkpoints == waiting.checkpoints == steps(2, 4, 6)
    for name in run.checkpoints:
        expected = saved(waiting, name)
        assert [key for key, tensor in saved(run, name).items() if not torch.equal(tensor, expected[key])] == []


def test_an_error_is_a_warning_at_the_next_step(run: LoopRun, disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    disk.error = lambda step: MoeLmError("cannot write") if step == 2 else None
    told = []

    def at(step: int) -> None:
        if step == 2:
            disk.free.set()
            time.sleep(0.2)  # until the save has failed
        told.append("warning" in capsys.readouterr().out)

    run.source.at = at
    run()
    assert told == [False, False, False, True, False, False]
    assert run.checkpoints == steps(4, 6)


def test_a_signal_while_a_checkpoint_is_written_waits_for_it_and_saves_the_last_step(run: LoopRun, disk: Disk) -> None:
    def at(step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)  # another thread takes it
            threading.Timer(0.2, disk.free.set).start()

    run.source.at = at
    assert run().stopped
    assert run.checkpoints == steps(2, 3)
    assert disk.most_writers == 1


@pytest.mark.parametrize("error", [MoeLmError("a corrupt shard"), ZeroDivisionError()])
def test_an_error_of_training_leaves_the_checkpoint_under_way_whole(run: LoopRun, disk: Disk, error: Exception) -> None:
    def at(step: int) -> None:
        if step == 3:
            threading.Timer(0.2, disk.free.set).start()
            raise error

    run.source.at = at
    with pytest.raises(type(error)):
        run()
    assert disk.writers == 0
    assert run.checkpoints == steps(2)
    saved(run, run.checkpoints[0])
