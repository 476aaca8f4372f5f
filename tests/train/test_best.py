"""Best and archived checkpoints, and early stopping by the held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_lm.checkpoint import checkpoint, retain
from moe_lm.data.batches import BatchSource
from moe_lm.train import loop
from tests.loops import LoopRun, Watched, poisoned, sigterm

pytestmark = pytest.mark.usefixtures("one_thread")
Losses = Callable[[LoopRun, list[float]], None]


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> Losses:
    """Let the evaluations of a run find these losses at its steps from 1 on."""

    def give(run: LoopRun, losses: list[float]) -> None:
        def evaluate(_: Any, wants_to_stop: Callable[[], bool]) -> dict[str, float] | None:
            step = next(int(tensor) for name, tensor in run.engine.state().items() if name.startswith("step."))
            return None if wants_to_stop() else {"val_loss": losses[step - 1]}

        monkeypatch.setattr(loop, "evaluate", evaluate)

    return give


def names(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_the_best_is_saved_when_it_is_found_and_kept(tmp_path: Path, ragged: BatchSource, held_out: Losses) -> None:
    run = LoopRun(tmp_path, ragged, eval_every=1, keep=1, best=True)
    held_out(run, [5, 3, 4, 4, 4, 3.5])
    result = run()
    assert result.best == (2, 3)
    assert run.checkpoints == names(2, 6)
    assert retain.best(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"
    assert retain.held_out_loss(tmp_path / "checkpoints" / "step-00000006") == 3.5


def test_the_last_may_be_the_best(tmp_path: Path, ragged: BatchSource, held_out: Losses) -> None:
    run = LoopRun(tmp_path, ragged, eval_every=1, keep=1, best=True)
    held_out(run, [5, 3, 4, 4, 4, 2.5])
    assert run().best == (6, 2.5)
    assert run.checkpoints == names(6)


def test_without_best_an_evaluation_saves_nothing(tmp_path: Path, ragged: BatchSource, held_out: Losses) -> None:
    run = LoopRun(tmp_path, ragged, eval_every=1)
    held_out(run, [5, 4, 3, 2, 1, 0.5])
    assert run().best == (6, 0.5)
    assert run.checkpoints == names(6)


def test_archived_checkpoints_stay_for_good(tmp_path: Path, ragged: BatchSource) -> None:
    run = LoopRun(tmp_path, ragged, validation=[], save_every=3, archive_every=2, keep=1)
    run()
    assert run.checkpoints == names(2, 4, 6)
    for name in run.checkpoints:
        checkpoint.verify(tmp_path / "checkpoints" / name)
        assert "archive_every=2" in (tmp_path / "checkpoints" / name / "PINNED").read_text()
    checkpoint.pin(tmp_path / "checkpoints" / "step-00000002", "the base of adapters")
    checkpoint.verify(tmp_path / "checkpoints" / "step-00000002")


@pytest.mark.parametrize("stopped_in", [None, 2, 3], ids=["at once", "with a signal", "with a signal at the last step"])
def test_a_run_ends_early_when_the_held_out_loss_stays_higher(
    tmp_path: Path, ragged: BatchSource, held_out: Losses, stopped_in: int | None
) -> None:
    """Also when it is interrupted on the way: the evaluation that a signal forestalled is made up for."""

    run = LoopRun(
        tmp_path,
        Watched(ragged, lambda step: sigterm() if step == stopped_in else None),
        eval_every=1,
        early_stopping=2,
    )
    held_out(run, [5, 3, 4, 4, 1, 1])
    result = run()
    if stopped_in is not None:
        assert (result.step, result.stopped) == (stopped_in + 1, True)
        run.source = ragged
        result = run()
    assert (result.step, result.stopped, result.best, result.evaluations_since_best) == (4, False, (2, 3), 2)
    assert [record["val_loss"] for record in run.records] == [5, 3, 4, 4]
    assert [event for event in run.kinds if event[0] == "early_stop"] == [("early_stop", 4)]
    result = run()
    assert (result.step, result.stopped) == (4, False)
    assert run.steps == [1, 2, 3, 4]


def test_a_run_that_ends_early_after_a_rollback_saves_its_end(
    tmp_path: Path, ragged: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also at the step, or before, from which it went on when it was started."""
    losses = iter([5, 4, 3, 2, 1, 9, 9, 9, 9, 9])
    monkeypatch.setattr(loop, "evaluate", lambda _, stop: None if stop() else {"val_loss": next(losses)})
    run = poisoned(tmp_path, ragged, 5, 6, 7, eval_every=1, early_stopping=3)
    run.source = Watched(ragged, lambda step: sigterm() if step == 6 else None)
    assert (run().step, run.checkpoints) == (7, names(4, 7))
    run.source = ragged
    result = run()
    assert ("rollback", 8) in run.kinds
    assert (result.step, result.stopped, result.best) == (7, False, (4, 2))
    assert run.checkpoints == names(4, 7)
    assert not (tmp_path / "checkpoints" / "step-00000007" / checkpoint.DOUBTFUL).exists()


def test_an_archive_that_is_due_in_trouble_is_made_when_that_is_over(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 7, by=1000.0, archive_every=8, keep=1)
    run()
    assert run.kinds == [("spike", 8)]
    assert run.checkpoints == names(9, 12)
