"""A run that is given a time: its last step moves to where that time ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import ScheduleConfig, TrainConfig
from moe_lm.optim.groups import schedule_factor
from moe_lm.train import pretrain
from moe_lm.train.timetable import LEAST_STEPS, Timetable
from tests.processes import metrics

WSD = ScheduleConfig(name="wsd", warmup_steps=20, decay_fraction=0.6, min_ratio=0.02)


class Run:
    """A run of steps that take these seconds, on a clock of its own."""

    def __init__(self, seconds: Iterator[float], most_steps: int = 2000) -> None:
        self.now, self._seconds = 0.0, seconds
        self.config = TrainConfig(steps=most_steps, global_batch_size=1, schedule=WSD)
        self.rates: list[float] = []

    def within(self, ends: float, after: float = 0.0) -> Run:
        timetable = Timetable(ends, self.config, after=lambda seconds: after * seconds, clock=lambda: self.now)
        step, self.config = 0, timetable.config
        while step < self.config.steps:
            self.rates.append(schedule_factor(step, self.config.steps, self.config.schedule))
            self.now += next(self._seconds)
            step += 1
            self.config = timetable.fit(step)
        return self


def test_a_run_ends_in_time_though_the_first_step_compiles() -> None:
    run = Run(itertools.chain([30.0], itertools.repeat(0.5))).within(100, after=4)
    assert run.now == pytest.approx(100 - 4 * 0.5, abs=0.5)
    assert run.config.steps == len(run.rates) == 1 + int(68 / 0.5)


@pytest.mark.parametrize("later", [0.5, 2.0], ids=["faster", "slower"])
@pytest.mark.parametrize("change", [10, 60, 110], ids=["in the warm-up", "before the decay", "in the decay"])
def test_steps_that_change_their_speed_end_in_time_and_the_rate_falls_to_its_end(change: int, later: float) -> None:
    seconds = itertools.chain(itertools.repeat(1.0, change), itertools.repeat(later))
    run = Run(seconds).within(160)
    assert run.now == pytest.approx(160, abs=later)
    end = run.rates[-1]
    assert end < 0.1
    peak = run.rates.index(max(run.rates))
    falls = [before - after for before, after in itertools.pairwise(run.rates[peak:])]
    assert min(falls) >= -0.02  # a step later than thought, of a decay that is nearly over
    assert max(falls[:-LEAST_STEPS]) < 0.1  # no cliff


def test_short_of_time_a_run_takes_its_fewest_steps_with_a_warm_up_that_fits() -> None:
    run = Run(itertools.repeat(5.0)).within(0.1)
    assert len(run.rates) == LEAST_STEPS
    assert run.config.schedule.warmup_steps == LEAST_STEPS // 4


def test_a_run_takes_at_most_the_steps_of_its_config() -> None:
    run = Run(itertools.repeat(0.1), most_steps=100).within(1000)
    assert (len(run.rates), run.config.schedule) == (100, WSD)


def test_a_run_of_few_steps_warms_up_in_a_quarter_of_them_though_there_is_time_for_all() -> None:
    run = Run(itertools.repeat(0.1), most_steps=LEAST_STEPS).within(1000)
    assert (len(run.rates), run.config.schedule.warmup_steps) == (LEAST_STEPS, LEAST_STEPS // 4)
    assert max(run.rates) == 1
    assert run.rates[-1] < 0.3


@pytest.mark.usefixtures("one_thread")
def test_the_warm_up_is_cut_from_the_first_step(tiny_pretrain: Path, tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}", "train.steps=8", "train.eval_batches=1", "train.schedule.warmup_steps=20"]
    config = load_config(PretrainConfig, tiny_pretrain, settings)
    pretrain.run(config, timetable=Timetable(1e9, config.train))
    rates = [line["lr"] for line in metrics(tmp_path)]
    assert max(rates) == pytest.approx(config.train.optimizer.lr) == rates[2]
    assert "warm-up" not in (tmp_path / "train.log").read_text()


@pytest.mark.usefixtures("one_thread")
def test_a_run_in_a_time_keeps_the_steps_that_it_had(tiny_pretrain: Path, tmp_path: Path) -> None:
    """In its folder and in its checkpoints, so that it is finished and not refused when it is started again."""
    settings = [f"run_dir={tmp_path}", "train.steps=50", "train.eval_batches=1", "train.schedule.name=wsd"]
    config = load_config(PretrainConfig, tiny_pretrain, settings)
    result = pretrain.run(config, timetable=Timetable(0.0, config.train, clock=itertools.count().__next__))
    assert (result.step, result.stopped, result.validation_loss is not None) == (LEAST_STEPS, False, True)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, LEAST_STEPS + 1))
    kept = load_config(PretrainConfig, tmp_path / "config.yaml")
    assert kept.train.steps == LEAST_STEPS
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert load_config(PretrainConfig, folder / "config.yaml") == kept
    assert pretrain.run(kept).step == LEAST_STEPS
    assert "this run is finished: all 8 steps are done" in (tmp_path / "train.log").read_text()
