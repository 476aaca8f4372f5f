"""The records of steps: when, after how many tokens, and the load of every expert."""

from __future__ import annotations

import time
from itertools import accumulate
from pathlib import Path

import pytest

from moe_lm.data.batches import BatchSource
from moe_lm.train.checkpoints import load
from tests.loops import LoopRun, Watched, sigterm
from tests.processes import events

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_record_says_when_and_after_how_many_tokens_also_after_a_resume(tmp_path: Path, ragged: BatchSource) -> None:
    run = LoopRun(tmp_path, ragged, evaluate_first=True, save_every=2)
    run.source = Watched(ragged, lambda step: sigterm() if step == 3 else None)
    assert run().step == 4
    run.source = ragged
    run()
    first, *records = run.records
    assert (first["step"], first["tokens_so_far"]) == (0, 0)
    assert [record["tokens_so_far"] for record in records] == list(accumulate(record["tokens"] for record in records))
    times = [record["time"] for record in run.records]
    assert times == sorted(times)
    assert time.time() - 60 < times[0] < times[-1] < time.time()
    saves = [event["step"] for event in events(tmp_path, "save")]
    assert saves == [2, 4, 6]


def test_tokens_are_counted_on_after_a_checkpoint_that_has_not_counted_them(
    tmp_path: Path, ragged: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LoopRun(tmp_path, ragged, save_every=2, steps=4)
    run()
    run.config = run.config.model_copy(update={"steps": 6})
    monkeypatch.setattr("tests.loops.load", lambda *args: {k: v for k, v in load(*args).items() if k != "tokens"})
    run()
    assert run.records[-1]["tokens_so_far"] == sum(record["tokens"] for record in run.records)


def test_the_load_of_every_expert_is_in_the_first_record_and_at_the_log_interval(
    tmp_path: Path, ragged: BatchSource
) -> None:
    run = LoopRun(tmp_path, ragged)
    run()
    assert [record["step"] for record in run.records if "load" in record["experts"][0]] == [1, 3, 6]
    for layer in run.records[-1]["experts"]:
        assert len(layer["load"]) == 8
        assert sum(layer["load"]) == pytest.approx(800, abs=4)
        assert max(layer["load"]) == pytest.approx(100 * layer["max_over_mean"], abs=0.5)
