"""How many processes a run has, and what it leaves behind when it has ended."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_lm.cli.train import export_at_end, start_processes
from moe_lm.common.errors import UsageError
from moe_lm.config.run import PretrainConfig
from moe_lm.train import pretrain
from moe_lm.train.result import TrainingResult
from tests.config.test_run import FINETUNE, PRETRAIN, write
from tests.conftest import MoeLm
from tests.processes import rank_environment

Started = list[tuple[list[str], dict[str, str]]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write(tmp_path / "x.yaml", PRETRAIN)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The programs that this process would have become, with their environments."""
    found: Started = []

    def execve(program: str, arguments: list[str], environment: dict[str, str]) -> None:
        assert program == sys.executable
        found.append((arguments, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives this machine so many GPUs."""
    return lambda count: monkeypatch.setattr("torch.cuda.device_count", lambda: count)


@pytest.mark.parametrize(("asked", "processes"), [(("--gpus", "all"), 8), (("--gpus=3",), 3), (("--processes", 2), 2)])
def test_several_processes_are_started_by_torchrun(
    asked: tuple[object, ...], processes: int, config: Path, started: Started, here: Any, moe_lm: MoeLm
) -> None:
    here(8)
    assert moe_lm("pretrain", config, "--train.steps", "7", *asked).code == 0
    ((arguments, environment),) = started
    assert arguments[1:5] == ["-m", "moe_lm.parallel.torchrun", "--nproc-per-node", str(processes)]
    assert arguments[-5:] == ["--module", "moe_lm", "pretrain", str(config), "train.steps=7"]
    assert environment["MOE_LM_COMMAND"].endswith(" ".join(map(str, asked)))  # what is said to go on


def test_fine_tuning_too(tmp_path: Path, started: Started, here: Any, moe_lm: MoeLm) -> None:
    here(2)
    assert moe_lm("finetune", write(tmp_path / "y.yaml", FINETUNE), "--gpus", "2").code == 0
    assert started[0][0][-2:] == ["finetune", str(tmp_path / "y.yaml")]


@pytest.mark.parametrize(
    ("gpus", "asked", "said"),
    [
        (
            0,
            ("--gpus", "all"),
            "--gpus all: there is no GPU here (moe-lm doctor says what there is); leave it out, or ",
        ),
        (2, ("--gpus", "8"), "--gpus 8: this machine has 2; give a number from 1 to 2, or all"),
        (2, ("--gpus", "some"), "--gpus some: this machine has 2"),
        (2, ("--gpus", "2", "--processes", "2"), "--gpus 2 and --processes 2 both say how many; give one of them"),
        (
            2,
            ("--gpus", "all", "parallel.device=cpu"),
            "--gpus all and parallel.device=cpu contradict each other; leave",
        ),
        (2, ("--gpu", "h100"), "--gpu h100 has no meaning for a run that starts"),
        (8, ("--gpus", "all", "train.lr=1"), "unknown key train.lr"),
    ],
)
def test_what_is_not_here_is_refused_before_anything_starts(
    gpus: int, asked: tuple[str, ...], said: str, config: Path, started: Started, here: Any, moe_lm: MoeLm
) -> None:
    here(gpus)
    done = moe_lm("pretrain", config, *asked)
    assert (done.code, done.err.count("\n"), started) == (2, 1, [])
    assert said in done.err


def test_a_rank_of_a_launcher_starts_nothing(
    config: Path, started: Started, here: Any, moe_lm: MoeLm, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(2)
    for name, value in rank_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    settings = PretrainConfig.model_validate(PRETRAIN)
    for option in ("--gpus", "--processes"):
        with pytest.raises(UsageError, match=f"{option} 2 has no meaning for a run that a launcher started"):
            start_processes(["pretrain", str(config)], 2, settings, {option: 2})
    start_processes(["pretrain", str(config)], None, settings, {})
    assert started == []


@pytest.mark.parametrize(
    ("gpus", "asked", "is_said"),
    [
        (8, (), True),
        (8, ("--gpus", "1"), False),
        (8, ("parallel.device=cpu",), False),
        (1, (), False),
        (0, (), False),
    ],
)
def test_idle_gpus_are_told_of(
    gpus: int, asked: tuple[str, ...], is_said: bool, config: Path, here: Any, moe_lm: MoeLm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    here(gpus)
    monkeypatch.setattr(pretrain, "run", lambda *args: TrainingResult())
    done = moe_lm("pretrain", config, *asked)
    assert done.code == 0, done.err
    wanted = f"this run has 1 of the 8 GPUs that are here; for all of them: moe-lm pretrain {config} --gpus all\n"
    assert done.err == (wanted if is_said else "")


def test_a_finished_run_is_exported_and_a_failure_of_that_is_not_one_of_the_run(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "export").touch()  # in the way
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={run}", "train.steps=1", "checkpoint.export=hf")
    assert done.code == 0
    assert "the run is saved, but not exported: " in done.err
    assert f"to try again: moe-lm export {run} {run}/export/step-00000001" in done.err
    (run / "export").unlink()
    export_at_end(run, 1)
    assert f"exported to {run}/export/step-00000001, for transformers and vLLM" in capsys.readouterr().err
    assert json.loads((run / "export" / "step-00000001" / "config.json").read_text())["hidden_size"] > 0
    export_at_end(run, 1)  # once is enough
    assert capsys.readouterr().err == ""


def test_a_model_that_cannot_be_exported_is_refused_before_it_is_trained(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", "checkpoint.export=hf",
                  "model.position_embedding=learned")  # fmt: skip
    assert (done.code, (tmp_path / "run").exists()) == (2, False)
    assert "no family of Hugging Face holds this model" in done.err
