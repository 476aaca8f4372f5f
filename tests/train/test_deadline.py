"""The end of `train.hours`, on a clock that a step, an evaluation or a save moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint import write
from moe_lm.common.process import seconds_since_start
from moe_lm.common.signals import StopSignals
from moe_lm.data.batches import BatchSource
from moe_lm.train import deadline
from moe_lm.train.checkpoints import Checkpoints
from moe_lm.train.loop import Loop
from tests.loops import LoopRun, Watched

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = 3600.0  # seconds, an hour


class Clock:
    """Seconds of a process, which pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadline, "seconds_since_start", clock)
    return clock


def timed(folder: Path, source: BatchSource, clock: Clock, step: float, **settings: Any) -> LoopRun:
    """A run of an hour whose steps take so many seconds."""
    return LoopRun(folder, Watched(source, lambda number: clock.pass_(step * (number < 100))), hours=1, **settings)


@pytest.mark.parametrize(("step", "save", "every"), [(600, 100, 0), (400, 300, 1), (400, 300, 3), (100, 700, 4)])
def test_a_run_is_saved_before_its_hours_are_over(
    tmp_path: Path,
    ragged: BatchSource,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    step: float,
    save: float,
    every: int,
) -> None:
    """Whether a save was due just before or none ever was; and no two steps and saves too early."""
    written, saves = write.save, list[float]()

    def slow(*arguments: Any) -> Path:
        clock.pass_(save)
        saves.append(save)
        return written(*arguments)

    monkeypatch.setattr(write, "save", slow)
    monkeypatch.setattr(Checkpoints, "longest_save", property(lambda self: max(saves, default=None)))
    run = timed(tmp_path, ragged, clock, step, steps=90, save_every=every)
    result = run()
    assert (result.stopped, run.checkpoints[-1]) == (True, f"step-{result.step:08d}")
    assert LIMIT - 2 * (step + save) - deadline.LEAVING_SECONDS < clock.now <= LIMIT
    [stop] = (event for event in run.events if event["event"] == "stop")
    assert stop["message"] == f"stopping after step {result.step}: train.hours=1 are nearly over"


def test_the_last_save_is_reckoned_behind_one_in_the_background(
    tmp_path: Path, ragged: BatchSource, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints, "longest_save", 600.0)
    run = timed(tmp_path, ragged, clock, 1)
    run()
    loop = Loop(run.training, {}, StopSignals())
    clock.now = LIMIT - deadline.SPARE * 1000
    with run.training.checkpoints:
        for under_way in (False, True):
            monkeypatch.setattr(Checkpoints, "is_saving", under_way)
            assert loop._wants_to_stop() is under_way


def test_the_same_command_goes_on_for_as_long_again_to_the_bit(
    tmp_path: Path, ragged: BatchSource, clock: Clock
) -> None:
    whole = LoopRun(tmp_path / "whole", ragged)
    assert not whole().stopped
    parted = timed(tmp_path / "parted", ragged, clock, 850)
    steps = []
    for _ in range(2):
        clock.now = 0
        result = parted()
        steps.append((result.step, result.stopped))
    assert steps == [(3, True), (6, False)]
    state, expected = parted.state, whole.state
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []


def test_an_evaluation_that_takes_too_long_ends_and_is_made_up_for(
    tmp_path: Path, ragged: BatchSource, clock: Clock
) -> None:
    class Held(list[Any]):
        def __getitem__(self, places: Any) -> Any:
            clock.pass_(1800)
            return super().__getitem__(places)

    held_out = Held(ragged.batch(100 + number, range(2)) for number in range(5))
    run = timed(tmp_path, ragged, clock, 10, validation=held_out, steps=2)
    assert (run().stopped, run.trainer(2)["validation_loss"]) == (True, None)
    assert clock.now <= LIMIT + 1800
    clock.now = -9000  # a longer time
    assert run().validation_loss is not None


def test_only_the_main_rank_looks_at_its_clock(tmp_path: Path, ragged: BatchSource, clock: Clock) -> None:
    """The others hear of it as of a signal, so that all stop after the same step."""
    run = timed(tmp_path, ragged, clock, 1)
    run()
    clock.now = LIMIT
    for rank in (0, 1):
        run.engine.topology = replace(run.engine.topology, rank=rank)
        loop = Loop(run.training, {}, StopSignals())
        assert loop._wants_to_stop() is (rank == 0)


def test_a_process_knows_how_long_it_has_run() -> None:
    first, second = seconds_since_start(), seconds_since_start()
    assert 0 < first <= second < first + 60
