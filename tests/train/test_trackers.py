"""Experiment trackers: asked for by name, one run over resumes, and never in training's way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from accelerate.state import PartialState

from moe_lm.common.errors import UsageError
from moe_lm.config.run import LogConfig, TrackerName
from moe_lm.train.log import RunLog
from moe_lm.train.trackers import KINDS, grouped

SETTINGS = {"train.steps": 10, "train.compile": False, "lora": None, "data.sources": [{"name": "books"}]}


@pytest.fixture(autouse=True)
def state() -> Iterator[None]:
    """The state of accelerate, which engines of this process look at, is left as it was."""
    before = dict(PartialState._shared_state)
    yield
    assert PartialState._shared_state == before


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 4.0 - step / 100, **more}


def tracked(run_dir: Path, name: str, start_step: int = 0) -> RunLog:
    run_dir.mkdir(exist_ok=True)
    config = LogConfig(trackers=(name,), project="house")  # type: ignore[arg-type]
    return RunLog(run_dir, config, 10, "pretrain", start_step, settings=SETTINGS)


def test_every_tracker_that_the_config_names_is_one_of_accelerates() -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    assert set(get_args(TrackerName)) == KINDS.keys() == tracking.LOGGER_TYPE_TO_CLASS.keys()


def test_figures_are_grouped_and_of_layers_only_the_mean_and_the_worst() -> None:
    layers = [
        {"max_violation": 0.5, "entropy": 0.75, "dead_experts": "0x4", "load": [100, 100]},
        {"max_violation": 1.5, "entropy": 0.25, "load": [50, 150]},
    ]
    figures = record(
        1, time=1e9, lr=3e-4, grad_norm=0.5, seconds=2.0, tokens_so_far=200, skipped=True, experts=layers,
        val_loss=3.5, val_loss_by_source={"books": 3.25}, tasks={"blimp": {"acc": 0.7}},
    )  # fmt: skip
    assert dict(grouped(figures)) == {
        "train/loss": 3.99, "train/tokens_so_far": 200.0, "train/skipped": 1.0,
        "optim/lr": 3e-4, "optim/grad_norm": 0.5, "system/seconds": 2.0,
        "val/loss": 3.5, "val/loss_by_source/books": 3.25, "tasks/blimp/acc": 0.7,
        "balance/max_violation_mean": 1.0, "balance/max_violation_max": 1.5,
        "balance/entropy_mean": 0.5, "balance/entropy_min": 0.25,
    }  # fmt: skip


def test_tensorboard_hides_repeated_steps_and_has_settings_and_samples(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, loss in ((0, 1.0), (2, 2.0)):
        with tracked(tmp_path, "tensorboard", start_step) as log:
            for step in (1, 2, 3):
                log.step(record(start_step + step, loss=loss))
            log.event("sample", start_step + 3, "a sample", prompt="Once", text="upon a time")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0),
    ]  # fmt: skip
    assert events.Tags()["scalars"] == ["train/loss"]
    assert b"upon a time" in events.Tensors("sample/Once/text_summary")[-1].tensor_proto.string_val[0]
    (settings,) = (tmp_path / "tensorboard").glob("*/hparams.yml")  # once, not again by the run that goes on
    assert "train.steps: 10" in settings.read_text()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in (name, "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    with pytest.raises(UsageError, match=rf"log\.trackers names {name}.*pip install {name}"):
        tracked(tmp_path, name).__enter__()


class FakeTracker(ModuleType):
    """Stands for the modules wandb and trackio, and for the runs that they begin: keeps the calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.broken = False
        self.config = self

    def init(self, **arguments: Any) -> FakeTracker:
        self.id, name = arguments.get("id"), arguments["name"]
        is_taken = arguments["resume"] == "never" and name in [before["name"] for before in self.of("init")]
        self.name = f"{name} 2" if is_taken else name  # as trackio does it
        self.calls.append(("init", arguments))
        return self

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        self.calls.append(("config", values))

    def define_metric(self, name: str, step_metric: str) -> None:
        self.calls.append(("define_metric", {name: step_metric}))

    def log(self, values: dict[str, float], step: int | None) -> None:
        if self.broken:
            raise ConnectionError("no network")
        self.calls.append(("log", {"at": step} | values))

    def finish(self) -> None:
        self.calls.append(("finish", {}))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [arguments for name, arguments in self.calls if name == kind]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeTracker:
    module = FakeTracker(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_wandb_stays_one_run_over_resumes(tmp_path: Path, fake: FakeTracker) -> None:
    for start_step in (0, 1, 0):
        with tracked(tmp_path / "lora", "wandb", start_step) as log:
            log.step(record(start_step + 1))
    first, resumed, afresh = fake.of("init")
    assert first["project"] == "house"
    assert first["name"] == f"{tmp_path.name}/lora"
    assert first["resume"] == "allow"
    assert first["id"] == resumed["id"] != afresh["id"]
    assert [(values["at"], values["step"]) for values in fake.of("log")] == [(None, 1), (None, 2), (None, 1)]
    plain = {"train.steps": 10, "train.compile": False, "lora": "null", "data.sources": '[{"name": "books"}]'}
    assert fake.of("config") == [plain, plain]  # at the two beginnings
    assert fake.calls[-1] == ("finish", {})


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_an_id_file_of_before_is_gone_on_with(tmp_path: Path, fake: FakeTracker) -> None:
    (tmp_path / "wandb-id").write_text("0123456789ab")
    with tracked(tmp_path, "wandb", start_step=4):
        pass
    assert fake.of("init")[0]["id"] == "0123456789ab"


@pytest.mark.parametrize("fake", ["trackio"], indirect=True)
def test_trackio_goes_on_in_the_run_of_its_name_when_the_folder_has_moved(tmp_path: Path, fake: FakeTracker) -> None:
    with tracked(tmp_path / "one", "trackio"):
        pass
    (tmp_path / "one").rename(tmp_path / "two")
    with tracked(tmp_path / "two", "trackio", start_step=4) as log:
        log.step(record(5))
    name = f"{tmp_path.name}/one"
    assert fake.of("init") == [
        {"project": "house", "name": name, "resume": "never"}, {"project": "house", "name": name, "resume": "allow"},
    ]  # fmt: skip
    assert fake.of("log") == [{"at": 5, "train/loss": record(5)["loss"]}]


@pytest.mark.parametrize("fake", ["trackio"], indirect=True)
def test_trackio_goes_on_in_the_run_that_it_named_otherwise(tmp_path: Path, fake: FakeTracker) -> None:
    """Since the name was taken: by a run that was killed before its first checkpoint, for instance."""
    for start_step in (0, 0, 4):
        with tracked(tmp_path / "one", "trackio", start_step):
            pass
    name = f"{tmp_path.name}/one"
    assert [init["name"] for init in fake.of("init")] == [name, name, f"{name} 2"]


@pytest.mark.parametrize("fake", ["trackio"], indirect=True)
def test_a_tracker_that_goes_away_is_said_once_and_left_alone(tmp_path: Path, fake: FakeTracker) -> None:
    with tracked(tmp_path, "trackio") as log:
        log.step(record(1))
        fake.broken = True
        for step in range(2, 5):
            log.step(record(step))
    assert (tmp_path / "train.log").read_text().count("warning: trackio could not be written: no network") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_a_tracker_that_does_not_start_is_an_error_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: FakeTracker
) -> None:
    """Whatever becomes of those that have started."""
    started = FakeTracker("trackio")
    monkeypatch.setitem(sys.modules, "trackio", started)
    monkeypatch.setattr(started, "finish", None)

    def refuse(**_: Any) -> None:
        raise RuntimeError("no account")

    monkeypatch.setattr(fake, "init", refuse)
    with pytest.raises(UsageError, match="wandb did not start: no account"):
        RunLog(tmp_path, LogConfig(trackers=("trackio", "wandb")), 10, "pretrain", 0).__enter__()
