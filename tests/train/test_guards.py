"""What a run does when its numbers go wrong (FAULTS rows 18 and 21): skips, spikes, events, and a clear end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_lm.common.errors import MoeLmError
from moe_lm.data.batches import BatchSource
from moe_lm.data.order import data_step
from moe_lm.train.guards import first_not_finite
from moe_lm.train.spikes import loss_limit
from tests.loops import Watched, poisoned

MoeLm = Callable[..., Any]  # the fixture `moe_lm`
pytestmark = pytest.mark.usefixtures("one_thread")


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
    (event,) = run.events
    assert event.pop("time") <= run.records[-1]["time"]
    assert event == {
        "event": "skip", "step": 6, "message": "step 6 was skipped: its loss is nan", "cause": "loss", "loss": None,
        "grad_norm": None, "data_step": 6, "in_row": 1,
    }  # fmt: skip
    assert event["message"] in capsys.readouterr().out
    assert event["message"] in (tmp_path / "train.log").read_text()
    assert len(run.trainer(12)["guard"]["recent"]) == 11


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
    (event,) = run.events
    assert (event["step"], event["cause"], event["grad_norm"]) == (6, "gradient", None)
    assert "but the gradient's norm is not finite" in event["message"]


def test_many_skips_are_all_events_and_do_not_flood_the_terminal(
    tmp_path: Path, ragged: BatchSource, capsys: pytest.CaptureFixture[str]
) -> None:
    run = poisoned(tmp_path, ragged, *range(0, 60, 2), steps=70, save_every=0, validation=[])
    run()
    assert len([kind for kind, _ in run.kinds if kind == "skip"]) == 30
    assert capsys.readouterr().out.count("was skipped: its loss is nan") == 12  # ten, the 20th and the 30th


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
    saved = list[list[str]]()  # before each step
    run = poisoned(tmp_path, Watched(ragged, lambda step: saved.append(run.checkpoints)), 7, by=1000.0, validation=[])
    run()
    (event,) = run.events
    assert (event["event"], event["step"]) == ("spike", 8)
    assert "far outside its recent range" in event["message"]
    assert "the step was taken" in event["message"]
    assert not any(record["skipped"] for record in run.records)
    assert len(run.trainer(12)["guard"]["recent"]) == 11
    assert max(run.trainer(12)["guard"]["recent"]) < 10
    assert saved[8] == ["step-00000004"]  # not 8, which was owed
    assert run.checkpoints == ["step-00000004", "step-00000009", "step-00000012"]


def test_the_step_of_a_spike_is_not_taken_if_so_wished(tmp_path: Path, ragged: BatchSource) -> None:
    """Nothing moves, the biases neither: the next loss is that of the same weights."""
    run = poisoned(tmp_path / "skip", ragged, 7, by=1000.0, guards={"on_spike": "skip"})
    nan = poisoned(tmp_path / "nan", ragged, 7, by=math.nan)
    run()
    nan()
    (event,) = run.events
    assert (event["event"], event["cause"], event["step"]) == ("skip", "spike", 8)
    assert [record["skipped"] for record in run.records] == [False] * 7 + [True] + [False] * 4
    assert [name for name, tensor in run.state.items() if not torch.equal(tensor, nan.state[name])] == []


def test_a_loss_that_stays_out_of_range_goes_back(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 5, 6, 7, 8, by=20.0, guards={"max_spike_steps": 4})
    run()
    assert run.kinds == [("spike", 6), ("spike", 7), ("spike", 8), ("spike", 9), ("rollback", 9)]
    assert run.events[-1]["window"] == [4, 9]
    assert "the loss has been far outside its recent range for 4 steps" in run.events[-1]["message"]
    assert run.checkpoints == ["step-00000004", "step-00000008", "step-00000012"]


# The end


def test_a_run_that_skipped_most_of_its_last_steps_is_no_success(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, *range(0, 12, 3), *range(1, 12, 3), save_every=0)
    with pytest.raises(MoeLmError, match=r"8 of the last 12 steps were skipped, so nothing was saved"):
        run()
    assert run.checkpoints == []


def test_a_run_that_ends_with_a_skipped_step_says_so(tmp_path: Path, ragged: BatchSource) -> None:
    run = poisoned(tmp_path, ragged, 11)
    assert run().step == 12
    assert run.events[-1]["message"].startswith("step 12 is saved although the last step was skipped")
    assert run.checkpoints == ["step-00000004", "step-00000008", "step-00000012"]


def test_a_rate_of_a_thousand_is_no_success(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path}", "train.optimizer.lr=1000", "train.steps=60")
    assert done.code == 1
    assert "10 steps in a row were skipped, and there is no good checkpoint to go back to" in done.err
    assert "lower train.optimizer.lr" in done.err
    assert list((tmp_path / "checkpoints").iterdir()) == []
