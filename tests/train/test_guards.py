"""What a run does when its numbers go wrong (FAULTS rows 18, 20 and 21): events, rollbacks, and a clear end."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lm.common.errors import MoeLmError
from moe_lm.data.batches import Batch, BatchSource, PackedBatches
from moe_lm.objective.training_loss import NextToken, Score
from moe_lm.train import pretrain
from moe_lm.train.guards import NOTE, data_step, first_not_finite, with_new_settings
from moe_lm.train.spikes import loss_limit
from tests.loops import LeftOut, LoopRun, Watched
from tests.processes import events as logged_events
from tests.processes import metrics
from tests.runs import figures

MoeLm = Callable[..., Any]  # the fixture `moe_lm`
pytestmark = pytest.mark.usefixtures("one_thread")


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.05)  # another thread takes it


class Killed(BaseException):
    """Ends the loop where it stands, as SIGKILL does."""


def poisoned(folder: Path, source: BatchSource, *steps: int, by: float = math.nan, **settings: Any) -> LoopRun:
    """12 steps, saved after every fourth; the loss of the data of these steps, counted from 0, is multiplied."""
    guards = {"max_skipped": 3, **settings.pop("guards", {})}
    settings = {"steps": 12, "save_every": 4, "keep": 9, "eval_every": 3, "guards": guards, **settings}
    return LoopRun(folder, source, poison=lambda step: by if step in steps else 1.0, **settings)


def events(run: LoopRun) -> list[dict[str, Any]]:
    return [event for event in run.events if event["event"] != "alarm"]


def kinds(run: LoopRun) -> list[tuple[str, int]]:
    return [(event["event"], event["step"]) for event in events(run)]


def trainer(run: LoopRun, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (run.folder / "checkpoints" / f"step-{step:08d}" / "trainer.json").read_text(), parse_constant=pytest.fail
    )
    return found


def assert_same(one: LoopRun, other: LoopRun) -> None:
    """Losses and other figures of every step, every tensor of the end and trainer.json are equal to the bit."""
    assert figures(one.folder) == figures(other.folder)
    assert one.state.keys() == other.state.keys()
    assert [name for name, tensor in one.state.items() if not torch.equal(tensor, other.state[name])] == []
    assert trainer(one, one.config.steps) == trainer(other, other.config.steps)


# The range of the loss, and data that is left out


@pytest.mark.parametrize(
    ("recent", "limit"),
    [
        ([], math.inf),
        ([10.0] * 5, 30.0),  # three times the first ones: divergence from the start
        ([10.0] * 20, 15.0),
        ([3.0] * 100, 3.3),  # no deviation at all: a tenth above
        ([0.01] * 100, 0.21),  # known by heart: a fifth of a nat above
        ([2.9, 3.1] * 50, 3.0 + 6 * 1.4826 * 0.1),
        ([11.0 - 0.07 * step for step in range(100)], 7.535 + 6 * 1.4826 * 1.75),  # the steep beginning
        ([*[3.0] * 99, 5.0], 5.0),  # what was accepted is in range
    ],
)
def test_the_limit_is_far_above_the_recent_losses(recent: list[float], limit: float) -> None:
    assert loss_limit(recent, 6.0) == pytest.approx(limit)
    assert loss_limit(recent, None) == math.inf


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=4))
def test_what_is_left_out_never_comes_and_the_rest_comes_in_order(gaps: list[tuple[int, int]]) -> None:
    windows, begin = [], 0
    for gap, length in gaps:
        windows.append((begin + gap, begin + gap + length))
        begin = windows[-1][1]
    kept = [step for step in range(100) if not any(start <= step < stop for start, stop in windows)]
    assert [data_step(step, windows) for step in range(50)] == kept[:50]


# A step that is skipped (row 18)


def test_a_loss_that_is_not_a_number_skips_its_step_and_is_said(
    tmp_path: Path, ragged: BatchSource, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, ragged, 5)
    run()
    assert run.steps == list(range(1, 13))
    assert [record["step"] for record in run.records if record["skipped"]] == [6]
    (event,) = events(run)
    assert event == {
        "event": "skip", "step": 6, "message": "step 6 was skipped: its loss is nan", "cause": "loss", "loss": None,
        "grad_norm": None, "data_step": 6, "in_row": 1,
    }  # fmt: skip
    assert event["message"] in capsys.readouterr().out
    assert event["message"] in (tmp_path / "train.log").read_text()
    assert len(trainer(run, 12)["guard"]["recent"]) == 11


def test_a_gradient_that_is_not_finite_is_named_as_the_cause(tmp_path: Path, ragged: BatchSource) -> None:
    """The loss is fine, and only the sum of its gradients overflows."""
    run = poisoned(tmp_path, ragged)
    build = run.build

    def with_hook() -> Any:
        engine = build()
        engine.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf if run.at == 5 else gradient)
        return engine

    run.build = with_hook  # type: ignore[method-assign]
    run.source = Watched(ragged, lambda step: setattr(run, "at", step))
    run()
    (event,) = events(run)
    assert (event["step"], event["cause"], event["grad_norm"]) == (6, "gradient", None)
    assert "but the gradient's norm is not finite" in event["message"]


def test_many_skips_are_all_events_and_do_not_flood_the_terminal(
    tmp_path: Path, ragged: BatchSource, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, ragged, *range(0, 60, 2), steps=70, save_every=0, validation=[])
    run()
    assert len([kind for kind, _ in kinds(run) if kind == "skip"]) == 30
    assert capsys.readouterr().out.count("was skipped: its loss is nan") == 12  # ten, the 20th and the 30th


# Back to a good checkpoint (row 20)


@pytest.mark.parametrize("background", [False, True])
def test_a_row_of_skips_goes_back_and_leaves_that_data_out(
    tmp_path: Path, ragged: BatchSource, background: bool
) -> None:
    """The rest is, to the bit, a run that went on from that checkpoint without the data."""
    run = poisoned(tmp_path / "run", ragged, 5, 6, 7, background=background)
    run()
    assert run.steps == list(range(1, 13))  # each once
    assert kinds(run) == [("skip", 6), ("skip", 7), ("skip", 8), ("rollback", 8)]
    rollback = events(run)[-1]
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
    assert trainer(run, 12)["guard"]["recent"] == trainer(other, 12)["guard"]["recent"]


BAD = (5, 6, 7, 11, 12, 13)  # the first three lead from step 8 back to 4, the others from step 10


@pytest.mark.parametrize(
    "interrupt",
    [
        pytest.param(("killed", 6), id="killed in the row"),
        pytest.param(("killed", 9), id="killed after the rollback, before it saved"),
        pytest.param(("killed, and the note is damaged", 9), id="its note of the rollback is damaged"),
        pytest.param(("killed", 14), id="killed after the second rollback"),
        pytest.param(("stopped", 6), id="stopped in the row"),
        pytest.param(("stopped", 7), id="stopped when it must go back"),
    ],
)
def test_an_interrupted_run_goes_back_as_the_uninterrupted_one(
    tmp_path: Path, ragged: BatchSource, interrupt: tuple[str, int]
) -> None:
    how, when = interrupt
    whole, parted = poisoned(tmp_path / "whole", ragged, *BAD), poisoned(tmp_path / "parted", ragged, *BAD)
    whole()
    assert [kind for kind, _ in kinds(whole)].count("rollback") == 2

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
        assert [event for event in kinds(parted) if event[0] not in ("doubtful", "stop")] == kinds(whole)


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
    assert [event for event in kinds(run) if event[0] != "skip"] == [("rollback", 8), ("rollback", 7), ("gave_up", 7)]
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
    (event,) = events(run)
    assert (event["event"], event["step"], event["to"]) == ("rollback", 8, 4)
    assert event["reason"] == "model.model.embed_tokens.weight is not finite"
    assert run.checkpoints == ["step-00000012"]
    assert run.steps == list(range(1, 13))
    assert all(tensor.isfinite().all() for tensor in run.state.values())


@pytest.mark.parametrize("how", ["at the end", "on a signal"])
def test_the_last_save_keeps_the_good_checkpoint_too(tmp_path: Path, ragged: BatchSource, how: str) -> None:
    run = poisoned(tmp_path, ragged, keep=1, steps=12 if how == "on a signal" else 6)
    break_weight(run, 5, sigterm if how == "on a signal" else lambda: None)
    with pytest.raises(MoeLmError, match=r"model\.model\.embed_tokens\.weight is not finite, so nothing was saved"):
        run()
    assert run.checkpoints == ["step-00000004"]
    assert run().step == run.config.steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    sound = {"scalar": torch.tensor(1.0), "empty": torch.empty(0, 4), "counts": torch.arange(3)}
    for place in (0, 1, 517, 1030):
        weight = torch.linspace(-1, 1, 1031, dtype=dtype)
        assert first_not_finite({**sound, "weight": weight}) == ""
        weight[place] = value
        assert first_not_finite({**sound, "weight": weight}) == "weight"


# A loss far outside its recent range (row 21)


def test_a_spike_is_an_event_and_is_not_one_of_the_recent_losses(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 7, by=1000.0)
    run()
    (event,) = events(run)
    assert (event["event"], event["step"]) == ("spike", 8)
    assert "far outside its recent range" in event["message"]
    assert "the step was taken" in event["message"]
    assert not any(record["skipped"] for record in run.records)
    assert len(trainer(run, 12)["guard"]["recent"]) == 11
    assert max(trainer(run, 12)["guard"]["recent"]) < 10
    assert run.checkpoints == ["step-00000004", "step-00000009", "step-00000012"]  # 8 was owed


def test_the_step_of_a_spike_is_not_taken_if_so_wished(tmp_path: Path, ragged: BatchSource) -> None:
    """Nothing moves, the biases neither: the next loss is that of the same weights."""
    run = poisoned(tmp_path / "skip", ragged, 7, by=1000.0, guards={"on_spike": "skip"})
    nan = poisoned(tmp_path / "nan", ragged, 7, by=math.nan)
    run()
    nan()
    (event,) = events(run)
    assert (event["event"], event["cause"], event["step"]) == ("skip", "spike", 8)
    assert [record["skipped"] for record in run.records] == [False] * 7 + [True] + [False] * 4
    assert [name for name, tensor in run.state.items() if not torch.equal(tensor, nan.state[name])] == []


def test_a_loss_that_stays_out_of_range_goes_back(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 5, 6, 7, 8, by=20.0, guards={"max_spike_steps": 4})
    run()
    assert kinds(run) == [("spike", 6), ("spike", 7), ("spike", 8), ("spike", 9), ("rollback", 9)]
    assert events(run)[-1]["window"] == [4, 9]
    assert "the loss has been far outside its recent range for 4 steps" in events(run)[-1]["message"]
    assert run.checkpoints == ["step-00000004", "step-00000008", "step-00000012"]


# Good checkpoints, and the end


def test_a_checkpoint_that_a_signal_asks_for_in_a_row_of_skips_replaces_no_good_one(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = poisoned(tmp_path, ragged, 5, 6, keep=1)
    run.source = Watched(ragged, lambda step: sigterm() if step == 6 else None)
    result = run()
    assert (result.stopped, result.step) == (True, 7)
    assert run.checkpoints == ["step-00000004", "step-00000007"]
    assert kinds(run)[-2:] == [("stop", 7), ("doubtful", 7)]
    assert trainer(run, 7)["guard"]["skipped_in_row"] == 2
    run.source = ragged
    run()
    assert run.checkpoints == ["step-00000012"]


def test_a_run_that_skipped_most_of_its_last_steps_is_no_success(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, *range(0, 12, 3), *range(1, 12, 3), save_every=0)
    with pytest.raises(MoeLmError, match=r"8 of the last 12 steps were skipped, so nothing was saved"):
        run()
    assert run.checkpoints == []


def test_a_run_that_ends_with_a_skipped_step_says_so(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 11)
    assert run().step == 12
    assert events(run)[-1]["message"].startswith("step 12 is saved although the last step was skipped")
    assert run.checkpoints == ["step-00000004", "step-00000008", "step-00000012"]


# The program


@pytest.fixture
def spoilt_data(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Steps, counted from 0, on whose data the loss of `moe-lm pretrain` is not a number."""
    bad: set[int] = set()
    newest = [0]

    class Batches(PackedBatches):
        def batch(self, step: int, rows: range) -> Batch:
            newest[0] = step
            return super().batch(step, rows)

    class Spoilt(NextToken):
        def score(self, logits_BSV: torch.Tensor, batch: Batch) -> Score:
            score = super().score(logits_BSV, batch)
            return (
                score._replace(loss=score.loss * math.nan) if newest[0] in bad and logits_BSV.requires_grad else score
            )

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
    assert [event["window"] for event in logged_events(tmp_path, "rollback")] == [[10, 22]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]


def test_a_rate_of_a_thousand_is_no_success(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.optimizer.lr=1000", "train.steps=60")
    assert done.code == 1
    assert "10 steps in a row were skipped, and there is no good checkpoint to go back to" in done.err
    assert "lower train.optimizer.lr" in done.err
    assert list((tmp_path / "checkpoints").iterdir()) == []
