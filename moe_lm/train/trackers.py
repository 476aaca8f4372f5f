"""Experiment trackers: TensorBoard, Weights & Biases, trackio. Each is imported only if `log.trackers` names it."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

from moe_lm.common.errors import UsageError
from moe_lm.config.run import LogConfig


class Tracker(Protocol):
    """An experiment tracker."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record the scalars of a step."""

    def close(self) -> None: ...


def open_trackers(config: LogConfig, run_dir: Path, start_step: int) -> dict[str, Tracker]:
    """The trackers of `config` by name, going on after `start_step`.

    Raises UsageError if one is not installed or does not start.
    """
    kinds: dict[str, Callable[[str, Path, int], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
        "trackio": Trackio,
    }
    trackers: dict[str, Tracker] = {}
    for name in config.trackers:
        try:
            trackers[name] = kinds[name](config.project, run_dir, start_step)
        except ImportError as error:
            raise UsageError(
                f"log.trackers names {name}, which is not installed; pip install 'moe-lm[track]', or leave it out"
            ) from error
        except Exception as error:  # no account, no network, a full disk: each tracker has its own errors
            raise UsageError(f"log.trackers: {name} did not start: {error}; fix that, or leave it out") from error
    return trackers


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, project: str, run_dir: Path, start_step: int) -> None:
        summary_writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = summary_writer(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run on the server for each run folder, however often it is resumed."""

    def __init__(self, project: str, run_dir: Path, start_step: int) -> None:
        wandb: ModuleType = importlib.import_module("wandb")
        note = run_dir / "wandb-id"
        if start_step == 0 or not note.is_file():
            note.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            project=project, name=run_dir.name, id=note.read_text(encoding="utf-8"), resume="allow", dir=str(run_dir)
        )
        # By its own step counter the server would refuse the steps that a killed process has already sent.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run with the name of the run folder."""

    def __init__(self, project: str, run_dir: Path, start_step: int) -> None:
        self._trackio: ModuleType = importlib.import_module("trackio")
        self._trackio.init(project=project, name=run_dir.name, resume="allow" if start_step else "never")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._trackio.log(dict(scalars), step=step)

    def close(self) -> None:
        self._trackio.finish()
