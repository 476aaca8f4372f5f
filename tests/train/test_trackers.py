"""Experiment trackers: asked for by name, one run over resumes, and never in training's way."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moe_lm.common.errors import UsageError
from moe_lm.config.run import LogConfig
from moe_lm.train.log import RunLog


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 100, **more}


def tracked(run_dir: Path, name: str, start_step: int = 0) -> RunLog:
    config = LogConfig(trackers=(name,), project="house")  # type: ignore[arg-type]
    return RunLog(run_dir, config, total_steps=10, title="pretrain", start_step=start_step)


def test_tensorboard_gets_the_scalars_by_path(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracked(tmp_path, "tensorboard") as metrics:
        for step in (1, 2):
            metrics.step(record(step, skipped=False, experts=[{"entropy": 0.25}, {"entropy": 0.5}]))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("experts/1/entropy")] == [(1, 0.5), (2, 0.5)]
    assert "step" not in events.Tags()["scalars"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=rf"log\.trackers names {name}.*pip install 'moe-lm\[track\]'"):
        tracked(tmp_path, name).__enter__()


class FakeTracker(ModuleType):
    """Stands for the modules wandb and trackio, and for wandb's run: keeps the calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = False

    def init(self, **arguments: Any) -> FakeTracker:
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", {name: step_metric}))

    def log(self, scalars: dict[str, float], **arguments: Any) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.calls.append(("log", scalars | arguments))

    def finish(self) -> None:
        self.calls.append(("finish", {}))


def test_wandb_stays_one_run_over_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeTracker("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start_step in (0, 1, 0):
        with tracked(tmp_path, "wandb", start_step) as metrics:
            metrics.step(record(start_step + 1))
    first, resumed, afresh = [arguments for name, arguments in wandb.calls if name == "init"]
    assert first["project"] == "house"
    assert first["resume"] == "allow"
    assert first["id"] == resumed["id"] != afresh["id"]
    assert [arguments["step"] for name, arguments in wandb.calls if name == "log"] == [1, 2, 1]
    assert wandb.calls[-1] == ("finish", {})


def test_trackio_goes_on_in_the_run_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with tracked(tmp_path, "trackio", start_step=4) as metrics:
        metrics.step(record(5))
    assert trackio.calls[0] == ("init", {"project": "house", "name": tmp_path.name, "resume": "allow"})
    assert trackio.calls[1][1]["loss"] == record(5)["loss"]
    assert trackio.calls[1][1]["step"] == 5


def test_a_tracker_that_goes_away_is_said_once_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    with tracked(tmp_path, "trackio") as metrics:
        metrics.step(record(1))
        trackio.broken = True
        for step in range(2, 5):
            metrics.step(record(step))
    assert (tmp_path / "train.log").read_text().count("warning: trackio could not be written: no network") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_a_tracker_that_does_not_start_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no account")

    wandb = FakeTracker("wandb")
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UsageError, match="wandb did not start: no account"):
        tracked(tmp_path, "wandb").__enter__()
