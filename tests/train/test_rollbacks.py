"""Going back to a good checkpoint (FAULTS row 20): when, how often, and to the bit; checkpoints that are not good."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_lm.common.errors import MoeLmError
from moe_lm.config.data import Phase
from moe_lm.data.batches import Batch, BatchSource, PackedBatches
from moe_lm.objective.training_loss import NextToken, Predictions, Score
from moe_lm.tools.verify.documents import Documents
from moe_lm.train import pretrain
from moe_lm.train.guards import NOTE, with_new_settings
from tests.data.test_batches import make_shards
from tests.loops import LeftOut, LoopRun, Watched, poisoned, sigterm
from tests.processes import events, metrics, one_thread_here
from tests.runs import figures

MoeLm = Callable[..., Any]  # the fixture `moe_lm`
pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Ends the loop where it stands, as SIGKILL does."""


def assert_same(one: LoopRun, other: LoopRun) -> None:
    """Losses and other figures of every step, every tensor of the end and trainer.json are equal to the bit."""
    assert figures(one.folder) == figures(other.folder)
    assert one.state.keys() == other.state.keys()
    assert [name for name, tensor in one.state.items() if not torch.equal(tensor, other.state[name])] == []
    assert one.trainer(one.config.steps) == other.trainer(other.config.steps)


# Back to a good checkpoint (row 20)


@pytest.mark.parametrize("background", [False, True])
def test_a_row_of_skips_goes_back_and_leaves_that_data_out(
    tmp_path: Path, ragged: BatchSource, background: bool
) -> None:
    """The rest is, to the bit, a run that went on from that checkpoint without the data."""
    run = poisoned(tmp_path / "run", ragged, 5, 6, 7, background=background)
    run()
    assert run.steps == list(range(1, 13))  # each once
    assert run.kinds == [("skip", 6), ("skip", 7), ("skip", 8), ("rollback", 8)]
    rollback = run.events[-1]
    assert (rollback["to"], rollback["window"], rollback["rollbacks"]) == (4, [4, 8], 1)
    assert rollback["message"] == (
        "back from step 8 to step 4: 3 steps in a row were skipped; the data of steps 5 to 8 is left out from now on "
        "(rollback 1 of at most 3)"
    )
    other = LoopRun(tmp_path / "other", LeftOut(ragged, range(4, 8)), steps=12, save_every=4, keep=9, eval_every=3)
    other()
    shutil.rmtree(other.folder / "checkpoints" / "step-00000012")
    shutil.rmtree(other.folder / "checkpoints" / "step-00000008")
    other()
    assert [line["loss"] for line in run.records] == [line["loss"] for line in other.records]
    assert [name for name, tensor in run.state.items() if not torch.equal(tensor, other.state[name])] == []
    assert run.trainer(12)["guard"]["recent"] == other.trainer(12)["guard"]["recent"]


BAD = (5, 6, 7, 11, 12, 13)  # the first three lead from step 8 back to 4, the others from step 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LoopRun:
    """A run that goes back twice."""
    run = poisoned(tmp_path_factory.mktemp("whole"), Documents(seed=1), *BAD)
    with one_thread_here():
        run()
    assert [kind for kind, _ in run.kinds].count("rollback") == 2
    return run


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(("killed", 6), id="killed in the row"),
        pytest.param(("killed", 9), id="killed after the rollback, before it saved"),
        pytest.param(("killed, and the note is damaged", 9), id="its note of the rollback is damaged"),
        pytest.param(("killed", 14), id="killed after the second rollback"),
        pytest.param(("killed", 19), id="killed after the save that follows the rollbacks"),
        pytest.param(("stopped", 6), id="stopped in the row"),
        pytest.param(("stopped", 7), id="stopped when it must go back"),
    ],
)
def test_an_interrupted_run_goes_back_as_the_uninterrupted_one(
    tmp_path: Path, ragged: BatchSource, whole: LoopRun, interrupt: tuple[str, int]
) -> None:
    how, when = interrupt
    parted = poisoned(tmp_path, ragged, *BAD)

    def once(step: int) -> None:
        if step == when:
            parted.source = ragged
            if how != "stopped":
                raise Killed
            sigterm()

    parted.source = Watched(ragged, once)
    if how != "stopped":
        with pytest.raises(Killed):
            parted()
        if "damaged" in how:
            (parted.folder / "checkpoints" / "step-00000004" / NOTE).write_text('{"rollbacks"')
    else:
        assert parted().stopped
    parted()
    assert_same(parted, whole)
    if "damaged" not in how:  # else the first rollback is done again
        assert [event for event in parted.kinds if event[0] not in ("doubtful", "stop")] == whole.kinds


def test_a_phase_begins_with_its_step_after_a_rollback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [Phase(0, 4, 8, (1.0,)), Phase(10, 2, 16, (1.0,))]
    source = PackedBatches([make_shards([[number % 60 for number in range(4000)]])], phases, 4, 1, False)
    read, lengths = source.batch, list[int]()

    def noted(step: int, rows: range) -> Batch:
        batch = read(step, rows)
        lengths.append(batch.input_ids.shape[1])
        return batch

    monkeypatch.setattr(source, "batch", noted)
    run = poisoned(tmp_path / "run", source, 5, 6, 7, validation=[])
    run()
    assert [event["event"] for event in run.events].count("rollback") == 1
    assert lengths == [8] * 8 + [8] + [8] * 6 + [16] * 2  # back from step 8 to step 4; one was read ahead


def test_other_settings_begin_anew_but_for_the_data_that_is_left_out() -> None:
    memory = {"recent": [3.0, 2.9], "rollbacks": 3, "windows": [[40, 50]], "skipped": 30}
    assert with_new_settings({"step": 60, "guard": memory}) == {"step": 60, "guard": {"windows": [[40, 50]]}}
    assert with_new_settings({"step": 60}) == {"step": 60, "guard": {"windows": []}}


def test_a_run_goes_back_only_so_often_and_then_stops_with_its_good_checkpoints(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = poisoned(tmp_path, ragged, *range(5, 99), guards={"max_skipped": 3, "max_rollbacks": 2})
    with pytest.raises(
        MoeLmError, match=r"stopped at step 7: 3 steps in a row were skipped, after 2 rollbacks"
    ) as error:
        run()
    assert error.value.common
    assert error.value.exit_code == 1
    assert "look at the data of step 12 to 14" in str(error.value)
    assert [event for event in run.kinds if event[0] != "skip"] == [("rollback", 8), ("rollback", 7), ("gave_up", 7)]
    assert run.checkpoints == ["step-00000004"]
    assert f"error: {error.value}" in (tmp_path / "train.log").read_text()
    with pytest.raises(MoeLmError, match="after 2 rollbacks"):  # the same command does not get two more
        run()


def test_without_a_checkpoint_the_run_stops(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 1, 2, 3)
    with pytest.raises(
        MoeLmError, match=r"stopped at step 4: 3 steps in a row were skipped, and there is no good check"
    ):
        run()
    assert run.checkpoints == []


# A weight that is not finite (F1)


def break_weight(run: LoopRun, when: int, then: Callable[[], object] = lambda: None) -> None:
    """Before this step, once, give a weight the value NaN that no gradient shows: that of a token that never comes."""

    def at(step: int) -> None:
        if step == when:
            run.source = source
            with torch.no_grad():
                run.engine.model.model.embed_tokens.weight[5] = math.nan
            then()

    source, run.source = run.source, Watched(run.source, at)


def test_a_weight_that_is_not_finite_is_never_saved_and_the_run_goes_back(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, keep=1)
    break_weight(run, 6)
    run()
    (event,) = run.events
    assert (event["event"], event["step"], event["to"]) == ("rollback", 8, 4)
    assert event["reason"] == "model.model.embed_tokens.weight is not finite"
    assert run.checkpoints == ["step-00000012"]
    assert run.steps == list(range(1, 13))
    assert all(tensor.isfinite().all() for tensor in run.state.values())


@pytest.mark.parametrize("how", ["at the end", "on a signal"])
def test_the_last_save_keeps_the_good_checkpoint_too(tmp_path: Path, ragged: BatchSource, how: str) -> None:
    run = poisoned(tmp_path, ragged, keep=1, steps=12 if how == "on a signal" else 6)
    break_weight(run, 5, sigterm if how == "on a signal" else lambda: None)
    with pytest.raises(
        MoeLmError, match=r"model\.model\.embed_tokens\.weight is not finite, so nothing was saved"
    ) as error:
        run()
    assert "look at the data of step 5 to 6" in str(error.value)  # since the last sound look, at step 4
    assert run.checkpoints == ["step-00000004"]
    assert run().step == run.config.steps


# A checkpoint that is not good


def test_a_checkpoint_that_a_signal_asks_for_in_a_row_of_skips_replaces_no_good_one(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = poisoned(tmp_path, ragged, 5, 6, keep=1)
    run.source = Watched(ragged, lambda step: sigterm() if step == 6 else None)
    result = run()
    assert (result.stopped, result.step) == (True, 7)
    assert run.checkpoints == ["step-00000004", "step-00000007"]
    assert run.kinds[-2:] == [("stop", 7), ("doubtful", 7)]
    assert run.trainer(7)["guard"]["skipped_in_row"] == 2
    run.source = ragged
    run()
    assert run.checkpoints == ["step-00000012"]


def flip(folder: Path) -> None:
    """Damage the weights of a checkpoint."""
    file = next((folder / "model").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def test_a_doubtful_checkpoint_stays_until_the_good_one_before_it_is_verified(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = poisoned(tmp_path, ragged, 5, 6, 7)
    run.source = Watched(ragged, lambda step: sigterm() if step == 6 else None)
    run()
    assert run.checkpoints == ["step-00000004", "step-00000007"]
    flip(tmp_path / "checkpoints" / "step-00000004")
    run.source = ragged
    with pytest.raises(MoeLmError, match=r"no good checkpoint in .* is sound: step-00000004 \(model/.* checksum"):
        run()
    assert run.checkpoints == ["step-00000004", "step-00000007"]


def test_a_rollback_passes_over_a_damaged_checkpoint(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 9, 10, 11)
    run.source = Watched(ragged, lambda step: flip(tmp_path / "checkpoints" / "step-00000008") if step == 9 else None)
    run()
    assert [kind for kind in run.kinds if kind[0] != "skip"] == [("damaged_checkpoint", 12), ("rollback", 12)]
    assert run.events[-1]["to"] == 4
    assert run.checkpoints == [f"step-{name}" for name in ("00000004", "00000008", "00000008.damaged", "00000012")]


def test_by_choice_damage_that_a_rollback_finds_ends_the_run(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 9, 10, 11)
    run.checkpoint = run.checkpoint.model_copy(update={"on_damage": "stop"})
    run.source = Watched(ragged, lambda step: flip(tmp_path / "checkpoints" / "step-00000008") if step == 9 else None)
    with pytest.raises(MoeLmError, match=r"step-00000008 \(.*\); step-00000004 is sound, and checkpoint\.on_damage"):
        run()
    assert run.checkpoints == ["step-00000004", "step-00000008"]


# The program


@pytest.fixture
def spoilt_data(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps, counted from 0, on whose data the loss of `moe-lm pretrain` is not a number."""
    bad: set[int] = set()

    class Batches(PackedBatches):
        def batch(self, step: int, rows: range) -> Batch:
            batch = super().batch(step, rows)
            batch.cu_seqlens.data_step = step  # type: ignore[attr-defined]
            return batch

    class Spoilt(NextToken):
        def score(self, predictions: Predictions, batch: Batch) -> Score:
            score = super().score(predictions, batch)
            spoilt = score.loss.requires_grad and getattr(batch.cu_seqlens, "data_step") in bad  # noqa: B009
            return score._replace(loss=score.loss * math.nan) if spoilt else score

    monkeypatch.setattr(pretrain, "PackedBatches", Batches)
    monkeypatch.setattr(pretrain, "NextToken", Spoilt)
    return bad


def test_the_program_goes_back_ten_skipped_steps_later_and_finishes(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, spoilt_data: set[int]
) -> None:
    spoilt_data.update(range(12, 22))
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.steps=24", "checkpoint.every=10")
    done = moe_lm(*command, "train.schedule.warmup_steps=2")
    assert done.code == 0, done.err
    assert "back from step 22 to step 10: 10 steps in a row were skipped" in done.out
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 25))
    assert not any(line["skipped"] for line in metrics(tmp_path))
    assert [event["window"] for event in events(tmp_path, "rollback")] == [[10, 22]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]
