"""A run that goes on with other settings: more steps where its schedule allows them, changes for one start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_lm.config.reading import load_config
from moe_lm.config.run import PretrainConfig
from moe_lm.config.training import ScheduleConfig
from moe_lm.optim.groups import first_other_rate
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.train.summary import longer, opening_lines
from tests.processes import metrics
from tests.runs import last_checkpoint, tensors
from tests.tiny import tiny_model, write_run

pytestmark = pytest.mark.usefixtures("one_thread")
MoeLm = Callable[..., Any]
CONSTANT = ("train.schedule.name=constant", "train.schedule.warmup_steps=2", "train.eval_batches=1")
DECAYED = (
    "train.schedule.name=wsd", "train.schedule.warmup_steps=1", "train.schedule.decay_fraction=0.5",
    "train.eval_batches=1", "checkpoint.every=2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "done", "more", "first"),
    [
        ({"name": "constant", "warmup_steps": 5}, 100, 200, None),
        ({"name": "wsd", "warmup_steps": 5, "decay_fraction": 0.2}, 80, 200, None),  # the 81st is the first to decay
        ({"name": "wsd", "warmup_steps": 5, "decay_fraction": 0.2}, 82, 200, 81),
        ({"name": "wsd", "warmup_steps": 5, "decay_fraction": 0.2}, 70, 80, 65),  # now it would have begun at 64
        ({"name": "multistep", "warmup_steps": 5, "milestones": (0.5,)}, 50, 200, None),
        ({"name": "multistep", "warmup_steps": 5, "milestones": (0.5,)}, 51, 200, 50),
        ({"name": "cosine", "warmup_steps": 5}, 6, 200, None),  # the warm-up ends at the peak
        ({"name": "cosine", "warmup_steps": 5}, 7, 200, 6),
    ],
)
def test_steps_may_change_while_the_steps_that_are_done_had_the_same_rates(
    schedule: dict[str, Any], done: int, more: int, first: int | None
) -> None:
    assert first_other_rate(done, 100, more, ScheduleConfig(**schedule)) == first


def test_a_finished_run_at_a_constant_rate_goes_on_to_more_steps_to_the_bit(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    command = ("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'run'}", *CONSTANT)
    assert moe_lm(*command, "train.steps=4").code == 0
    raised = moe_lm(*command, "train.steps=8")
    assert (raised.code, raised.err) == (0, "")
    assert "going on after step 4 of 8" in raised.out
    assert "other settings" not in raised.out
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={tmp_path / 'whole'}", *CONSTANT, "train.steps=8").code == 0
    whole, parted = (tensors(last_checkpoint(tmp_path / name)) for name in ("whole", "run"))
    assert whole.keys() == parted.keys()
    assert all(torch.equal(tensor, parted[name]) for name, tensor in whole.items())
    assert [line["loss"] for line in metrics(tmp_path / "whole")] == [
        line["loss"] for line in metrics(tmp_path / "run")
    ]


@pytest.mark.parametrize(
    ("settings", "more"), [(CONSTANT, " train.steps=8"), (DECAYED, " init TEXT --for continue --start-from run")]
)
def test_a_finished_run_says_what_to_type_for_more(settings: tuple[str, ...], more: str, tiny_pretrain: Path) -> None:
    config = load_config(PretrainConfig, tiny_pretrain, ["run_dir=run", *settings, "train.steps=4"])
    engine: Any = None  # it is not asked
    (line,) = opening_lines("pretrain", config, config.model, engine, [], 4)
    assert line.startswith("this run is finished: all 4 steps are done; for more: ")
    assert line.endswith(more)


def test_twice_as_long_is_said_in_the_unit_that_was_given() -> None:
    assert longer("moe-lm pretrain a.yaml", 30) == "moe-lm pretrain a.yaml train.steps=60"
    assert longer("moe-lm pretrain a.yaml train.steps=30 seed=1", 30) == "moe-lm pretrain a.yaml seed=1 train.steps=60"
    assert longer("moe-lm pretrain a.yaml train.epochs=0.05", 30) == "moe-lm pretrain a.yaml train.epochs=0.1"
    assert longer("moe-lm pretrain a.yaml --train.epochs 2", 30) == "moe-lm pretrain a.yaml --train.epochs 4"
    assert longer("moe-lm pretrain a.yaml train.tokens=10B seed=1", 30) == (
        "moe-lm pretrain a.yaml train.tokens=20B seed=1"
    )
    assert longer("moe-lm pretrain a.yaml train.tokens=12345678", 30) == "moe-lm pretrain a.yaml train.tokens=24691356"


def test_steps_that_come_too_late_are_refused_with_the_reason(
    tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm
) -> None:
    run_dir = tmp_path / "run"
    command = ("pretrain", tiny_pretrain, f"run_dir={run_dir}", *DECAYED)
    assert moe_lm(*command, "train.steps=4").code == 0
    before = (run_dir / "config.yaml").read_text()
    late = moe_lm(*command, "train.steps=8")
    assert (late.code, late.out) == (2, "")
    assert late.err == (
        "error: train.steps: 4 -> 8 comes too late: 4 steps are done, and train.schedule.name=wsd would have given "
        f"other rates from step 4 on; begin another run with start_from={run_dir / 'checkpoints' / 'step-00000002'}, "
        "or keep the change with checkpoint.allow_changes=true\n"
    )
    fewer = moe_lm(*command, "train.steps=3", "checkpoint.allow_changes=true")
    assert (fewer.code, fewer.out) == (2, "")
    assert f"train.steps=3 is less than the 4 steps that {run_dir} has done; give at least 4" in fewer.err
    assert (run_dir / "config.yaml").read_text() == before


def test_changes_are_allowed_for_one_start_only(tiny_pretrain: Path, tmp_path: Path, moe_lm: MoeLm) -> None:
    run_dir = tmp_path / "run"
    assert moe_lm("pretrain", tiny_pretrain, f"run_dir={run_dir}", *CONSTANT, "train.steps=2").code == 0
    allowed = ("train.optimizer.lr=0.1", "train.steps=4", "checkpoint.allow_changes=true")
    assert moe_lm("pretrain", run_dir / "config.yaml", *allowed).code == 0
    for kept in (run_dir, last_checkpoint(run_dir)):
        values = yaml.safe_load((kept / "config.yaml").read_text())
        assert values["checkpoint"]["allow_changes"] is False
        assert values["train"]["optimizer"]["lr"] == 0.1
    refused = moe_lm("pretrain", run_dir / "config.yaml", "train.optimizer.lr=0.2")
    assert refused.code == 2
    assert "train.optimizer.lr: 0.1 -> 0.2" in refused.err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("optimizer.name=muon", "train.optimizer.name: adamw -> muon"),
        ("optimizer.ema_decay=0.9", "train.optimizer.ema_decay: null -> 0.9"),
    ],
)
def test_states_that_the_steps_have_not_kept_cannot_be_allowed(
    setting: str, said: str, tiny_pretrain: Path, pretrained: Path, moe_lm: MoeLm
) -> None:
    place = f"run_dir={pretrained}"
    done = moe_lm("pretrain", tiny_pretrain, place, "train.steps=30", f"train.{setting}", "checkpoint.allow_changes=1")
    assert (done.code, done.out) == (2, "")
    assert f"{said} needs states of the optimizer that the checkpoints in {pretrained} do not have" in done.err
    assert done.err.endswith(f"or begin another run with start_from={pretrained}\n")


def test_a_model_that_no_training_has_left_is_a_start_alone(
    tiny_pretrain: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, moe_lm: MoeLm
) -> None:
    merged = write_run(tmp_path / "merged", tiny_model(vocab_size=tiny_tokenizer.vocab_size), tiny_tokenizer)
    done = moe_lm("pretrain", tiny_pretrain, f"run_dir={merged}")
    assert (done.code, done.out) == (2, "")
    assert f"as merge, import and upcycle make it; begin another run with start_from={merged}" in done.err
