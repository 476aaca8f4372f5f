"""The loop: what it logs, evaluates and saves and when; signals (FAULTS rows 13 and 14); a full disk (row 9)."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.checkpoint import checkpoint, retain
from moe_lm.checkpoint.recovery import newest_sound
from moe_lm.common.errors import MoeLmError
from moe_lm.common.process import this_command
from moe_lm.common.signals import STOP_SIGNALS, StopSignals
from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch, BatchSource
from moe_lm.engine.engine import Engine
from moe_lm.objective.training_loss import num_targets
from moe_lm.parallel.topology import Topology
from moe_lm.train import loop
from moe_lm.train.checkpoints import load
from moe_lm.train.loop import local_micro_batches
from tests.loops import LoopRun, Watched
from tests.tiny import engine_of, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
PAD = 2
Record = dict[str, Any]


class HeldOut(list[Batch]):
    """Held-out batches of which `at(place)` is called before one is read; `asked` are their places."""

    def __init__(self, source: BatchSource, at: Callable[[int], None]) -> None:
        super().__init__(source.batch(place, range(2)) for place in range(5))
        self.at, self.asked = at, list[int]()

    def __getitem__(self, places: Any) -> Any:
        self.asked.append(places.start)
        self.at(places.start)
        return super().__getitem__(places)


def stop_at(when: int, number: signal.Signals = signal.SIGTERM) -> Callable[[int], None]:
    """Send this process a signal at this step or place."""

    def at(step: int) -> None:
        if step == when:
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # another thread takes it

    return at


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# Logging, evaluating, saving


def test_every_step_is_logged_with_its_figures(tmp_path: Path, ragged: BatchSource) -> None:
    run = LoopRun(tmp_path, ragged)
    result = run()
    assert run.steps == [1, 2, 3, 4, 5, 6]
    assert (result.step, result.stopped, result.loss) == (6, False, run.records[-1]["loss"])
    for step, record in enumerate(run.records):
        batch = ragged.batch(step, range(4))
        assert record["targets"] == num_targets(batch)
        assert record["tokens"] == int((batch.input_ids != PAD).sum())
        assert not record["skipped"]
        for name in ("loss", "balance_loss", "lr", "grad_norm", "tokens_per_second", "seconds", "memory_bytes"):
            assert record[name] > 0
        (layer,) = record["experts"]
        assert layer["max_violation"] == pytest.approx(layer["max_over_mean"] - 1)
        assert layer.keys() - {"load"} == {
            "max_over_mean", "max_violation", "entropy", "dead_share", "router_entropy", "bias_range",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "evaluated"),
    [
        ({}, [6]),
        ({"eval_every": 2}, [2, 4, 6]),
        ({"eval_every": 4}, [4, 6]),
        ({"eval_every": 4, "evaluate_first": True}, [0, 4, 6]),
        ({"eval_every": 2, "evaluate_first": True, "validation": []}, []),
    ],
)
def test_evaluates_when_it_is_due_and_at_the_end(
    tmp_path: Path, ragged: BatchSource, settings: dict[str, Any], evaluated: list[int]
) -> None:
    run = LoopRun(tmp_path, ragged, **settings)
    result = run()
    assert [record["step"] for record in run.records if "val_loss" in record] == evaluated
    if evaluated:
        sums, targets = run.engine.evaluate(run.validation)
        assert result.validation_loss == run.records[-1]["val_loss"] == pytest.approx(sums["loss"] / targets, rel=1e-12)


@pytest.mark.parametrize(
    ("save_every", "keep", "expected"), [(0, 2, [6]), (2, 2, [4, 6]), (2, 9, [2, 4, 6]), (4, 9, [4, 6]), (6, 1, [6])]
)
def test_saves_when_it_is_due_and_at_the_end(
    tmp_path: Path, ragged: BatchSource, save_every: int, keep: int, expected: list[int]
) -> None:
    run = LoopRun(tmp_path, ragged, save_every=save_every, keep=keep)
    result = run()
    assert run.checkpoints == [f"step-{step:08d}" for step in expected]
    assert result.checkpoint == tmp_path / "checkpoints" / "step-00000006"
    assert json.loads((result.checkpoint / "trainer.json").read_text())["step"] == 6


def test_a_finished_run_stays_as_it_is(tmp_path: Path, ragged: BatchSource) -> None:
    run = LoopRun(tmp_path, ragged)
    run()
    weights, records = run.state, run.records
    written = (tmp_path / "checkpoints" / "step-00000006" / "COMPLETE").stat().st_mtime_ns
    result = run()
    assert (result.step, result.stopped, result.checkpoint) == (6, False, None)
    assert run.records == records
    assert_equal(run.state, weights)
    assert (tmp_path / "checkpoints" / "step-00000006" / "COMPLETE").stat().st_mtime_ns == written


@pytest.mark.parametrize("evaluate_first", [False, True])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path, ragged: BatchSource, evaluate_first: bool) -> None:
    """From the last checkpoint, or from the start if there is none; the log has each step once."""
    whole = LoopRun(tmp_path / "whole", ragged, evaluate_first=evaluate_first)
    run = LoopRun(tmp_path / "parts", ragged, evaluate_first=evaluate_first, save_every=2)
    whole()
    run()
    for left in ("step-00000004", None):
        for folder in (run.folder / "checkpoints").iterdir():
            if folder.name != left:
                folder.rename(tmp_path / f"{folder.name}-after-{left}")
        run()
        assert run.steps == whole.steps == [*([0] if evaluate_first else []), 1, 2, 3, 4, 5, 6]
        assert [record["loss"] for record in run.records[-6:]] == [record["loss"] for record in whole.records[-6:]]
        assert_equal(run.state, whole.state)


# A full disk


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Makes the disk full, or not, as far as checkpoints are concerned."""
    full, sync = [False], os.fsync

    def fsync(descriptor: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    yield lambda now: full.__setitem__(0, now)
    full[0] = False


def test_a_full_disk_ends_no_run_that_has_steps_to_do(
    tmp_path: Path, ragged: BatchSource, full_disk: Callable[[bool], None], capsys: pytest.CaptureFixture[str]
) -> None:
    # The save after the fourth step fails.
    run = LoopRun(tmp_path, Watched(ragged, lambda step: full_disk(step == 3)), save_every=2, keep=9)
    assert not run().stopped
    assert run.checkpoints == ["step-00000002", "step-00000006"]
    out = capsys.readouterr().out
    assert out.count("warning: no checkpoint at step 4: cannot write the checkpoint") == 1
    assert "No space left on device" in out
    assert "training goes on" in out


def test_on_a_full_disk_at_the_last_step_older_checkpoints_give_way_and_a_signal_ends_the_trying(
    tmp_path: Path, ragged: BatchSource, full_disk: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_lm.checkpoint.saver.RETRY_SECONDS", 1)
    monkeypatch.setattr("moe_lm.checkpoint.saver.time.sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    run = LoopRun(tmp_path, Watched(ragged, lambda step: full_disk(step == 5)), save_every=2, keep=9)
    with pytest.raises(MoeLmError, match=r"step-00000006: No space left on device.*without it, kept: .*step-00000004"):
        run()
    full_disk(False)
    monkeypatch.undo()
    said = [event["message"] for event in run.events if event["event"] == "full_disk"]
    assert said[0] == "warning: the disk is full: gave up step-00000002 for the checkpoint of step 6"
    assert "trying again every 1 s" in said[1]
    assert run.checkpoints == ["step-00000004"]
    run.source = ragged
    assert run().step == 6


# Signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_in_a_step_ends_the_run_after_it(
    tmp_path: Path, ragged: BatchSource, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = LoopRun(tmp_path / "whole", ragged)
    parted = LoopRun(tmp_path / "parts", Watched(ragged, stop_at(3, number)), eval_every=4)
    whole()
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    result = parted()
    assert (result.step, result.stopped, result.validation_loss) == (4, True, None)
    assert parted.checkpoints == ["step-00000004"]
    assert f"stopped after step 4; to go on, run again: {this_command()}\n" in capsys.readouterr().out
    (event,) = parted.events
    assert (event["event"], event["step"]) == ("stop", 4)
    assert event["message"].startswith(f"stopping after step 4: {number.name}")
    assert {each: signal.getsignal(each) for each in before} == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) & {*STOP_SIGNALS} == set()
    parted.source = ragged
    assert parted().step == 6
    assert parted.steps == [1, 2, 3, 4, 5, 6]
    assert_equal(parted.state, whole.state)


def test_a_signal_in_an_evaluation_ends_it_early(tmp_path: Path, ragged: BatchSource) -> None:
    validation = HeldOut(ragged, stop_at(1))
    run = LoopRun(tmp_path, ragged, validation=validation, eval_every=4)
    result = run()
    assert (result.step, result.stopped, validation.asked) == (4, True, [0, 1])
    assert run.checkpoints == ["step-00000004"]
    assert run.steps == [1, 2, 3, 4]
    run.validation = [ragged.batch(0, range(2))]
    assert run().validation_loss is not None
    assert run.steps == [1, 2, 3, 4, 5, 6]


def test_a_signal_in_the_evaluation_before_the_first_step_leaves_nothing_half_done(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = LoopRun(tmp_path, ragged, validation=HeldOut(ragged, stop_at(1)), evaluate_first=True)
    result = run()
    assert (result.step, result.stopped) == (0, True)
    assert run.steps == []
    run.validation = [ragged.batch(0, range(2))]
    assert run().step == 6
    assert run.steps == [0, 1, 2, 3, 4, 5, 6]
    assert "val_loss" in run.records[0]


def test_the_last_step_is_saved_before_its_evaluation_which_a_signal_ends(tmp_path: Path, ragged: BatchSource) -> None:
    """The same command then makes up for the evaluation, and the figures are those of a run without a signal."""
    whole = LoopRun(tmp_path / "whole", ragged)
    assert whole().validation_loss == whole.records[-1]["val_loss"]
    validation = HeldOut(ragged, stop_at(1))
    run = LoopRun(tmp_path / "run", ragged, validation=validation)
    result = run()
    assert (result.step, result.stopped, validation.asked) == (6, True, [0, 1])
    assert run.checkpoints == ["step-00000006"]
    assert (run.steps, "val_loss" in run.records[-1]) == ([1, 2, 3, 4, 5, 6], False)
    run.validation = whole.validation
    result = run()
    assert (result.step, result.stopped) == (6, False)
    assert run.records[-1]["val_loss"] == whole.records[-1]["val_loss"] == result.validation_loss
    assert retain.held_out_loss(tmp_path / "run" / "checkpoints" / "step-00000006") == result.validation_loss
    checkpoint.verify(tmp_path / "run" / "checkpoints" / "step-00000006")
    run.validation = HeldOut(ragged, lambda _: pytest.fail("it is known"))
    run()


def test_an_evaluation_that_a_signal_ended_is_made_up_for(tmp_path: Path, ragged: BatchSource) -> None:
    whole = LoopRun(tmp_path / "whole", ragged, eval_every=2)
    whole()
    run = LoopRun(tmp_path / "run", ragged, validation=HeldOut(ragged, stop_at(1)), eval_every=2)
    assert run().step == 2
    run.validation = whole.validation
    run()
    assert [record.get("val_loss") for record in run.records] == [record.get("val_loss") for record in whole.records]


def test_one_rank_with_a_signal_stops_all(tmp_path: Path, ragged: BatchSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """`any_rank` decides, not this process's own signals: here another rank's flag is up at the third question."""
    run = LoopRun(tmp_path, ragged, validation=[])
    asked = []

    def any_rank(_: Engine, flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 3

    monkeypatch.setattr(Engine, "any_rank", any_rank)
    result = run()
    assert (result.step, result.stopped, asked) == (3, True, [False, False, False])
    assert run.checkpoints == ["step-00000003"]


def test_a_signal_in_a_made_up_evaluation_leaves_its_checkpoint_as_it_is(tmp_path: Path, ragged: BatchSource) -> None:
    """It was pinned since, and has nothing new to hold."""
    run = LoopRun(tmp_path, ragged, validation=HeldOut(ragged, stop_at(1)), eval_every=2)
    assert run().step == 2
    folder = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.pin(folder, "the base of adapters")
    written = (folder / "COMPLETE").stat().st_mtime_ns
    result = run()
    assert (result.step, result.stopped) == (2, True)
    assert (folder / "PINNED").is_file()
    assert (folder / "COMPLETE").stat().st_mtime_ns == written


def test_a_signal_ends_the_process_at_once_until_all_ranks_have_done_a_step(
    tmp_path: Path, ragged: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a rank within its first step ends at once, and is lost to one that is past it and waits for it."""
    received, deferred = StopSignals(), []

    def any_rank(_: Engine, flag: bool) -> bool:
        deferred.append(received.deferred)
        return flag

    monkeypatch.setattr(loop, "stop_signals", lambda: nullcontext(received))
    monkeypatch.setattr(Engine, "any_rank", any_rank)
    LoopRun(tmp_path, ragged, validation=[], steps=3)()
    assert deferred == [False, True, True]


# Rows and ranks


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3, 12])
def test_micro_batches_of_all_ranks_are_the_global_batch(
    ragged: BatchSource, world_size: int, micro_batch_size: int | None
) -> None:
    config = TrainConfig(steps=1, global_batch_size=12, micro_batch_size=micro_batch_size)
    engine = engine_of(tiny_model(), config)
    rows = []
    for rank in range(world_size):
        engine.topology = Topology(rank, world_size, rank)
        batches = local_micro_batches(engine, ragged, config, 7)
        assert all(len(batch.input_ids) <= (micro_batch_size or 12) for batch in batches)
        rows += [batch.input_ids for batch in batches]
    assert torch.equal(torch.cat(rows), ragged.batch(7, range(12)).input_ids)


def test_the_random_state_is_part_of_a_checkpoint(tmp_path: Path, ragged: BatchSource) -> None:
    """Nothing in the program draws from torch's generator in a step; what a user adds to the loss may."""

    def noise(_: int) -> float:
        return 1 + float(torch.rand(()))

    whole = LoopRun(tmp_path / "whole", ragged, validation=[], poison=noise)
    parted = LoopRun(tmp_path / "parted", Watched(ragged, stop_at(2)), validation=[], poison=noise)
    for run, seed in ((whole, 0), (parted, 1), (parted, 2)):  # another process would have another state
        torch.manual_seed(seed)
        run()
        parted.source = ragged if run is parted else parted.source
    assert [record["loss"] for record in parted.records] == [record["loss"] for record in whole.records]
    assert_equal(parted.state, whole.state)


def test_resume_without_a_checkpoint_begins_at_0(tmp_path: Path, ragged: BatchSource) -> None:
    run = LoopRun(tmp_path, ragged)
    run()
    assert load(run.engine, newest_sound(tmp_path / "nowhere").folder) == {}
    (tmp_path / "checkpoints" / "step-00000006" / checkpoint.COMPLETE).unlink()
    with pytest.raises(MoeLmError, match=r"no checkpoint in .* is sound"):
        load(run.engine, newest_sound(tmp_path / "checkpoints").folder)
