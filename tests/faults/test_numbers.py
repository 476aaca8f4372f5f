"""Losses and gradients that are not finite, or far out of their range (rows 18, 20, 21, 22)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_lm.checkpoint import checkpoint
from tests.faults.conftest import SHORT, Program, done, events, steps
from tests.runs import last_checkpoint, tensors

POISON = {"patch": "poisoned_loss"}


def finite(run_dir: Path) -> bool:
    """Whether every number of every checkpoint is finite."""
    folders = list((run_dir / "checkpoints").glob("step-*"))
    assert folders
    return all(bool(torch.isfinite(tensor.float()).all()) for folder in folders for tensor in tensors(folder).values())


@pytest.mark.row(18)
def test_a_nan_in_one_step_is_skipped_and_the_next_is_normal(
    whole: Path, tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    settings = (*SHORT, "train.steps=30")
    process = program(
        "pretrain",
        tiny_pretrain,
        f"run_dir={tmp_path}",
        *settings,
        patch="poisoned_loss",
        FROM=10,
        UNTIL=10,
        FACTOR="nan",
    )
    done(process)
    lines = steps(tmp_path)
    assert [line["step"] for line in lines if line["skipped"]] == [10]
    (event,) = events(tmp_path, "skip")
    assert event["step"] == 10
    assert event["message"] in (tmp_path / "train.log").read_text(encoding="utf-8")
    assert event["message"] in process.out
    assert [line["loss"] for line in lines[:9]] == [line["loss"] for line in steps(whole)[:9]]
    assert all(line["loss"] is not None for line in lines[10:])
    assert finite(tmp_path)


@pytest.mark.slow
@pytest.mark.row(20)
def test_ten_nans_in_a_row_go_back_and_leave_the_data_out(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, patch="poisoned_data", FROM=26, UNTIL=40
    )
    done(process)
    (event,) = events(tmp_path, "rollback")
    assert event["message"] in process.out
    assert [line["step"] for line in steps(tmp_path)][-1] == 60
    assert all(line["loss"] is not None for line in steps(tmp_path)[-20:])
    assert finite(tmp_path)


@pytest.mark.slow
@pytest.mark.row(20)
def test_a_run_that_cannot_be_mended_stops_with_its_good_checkpoint(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "train.steps=1000", "checkpoint.keep=1",
        patch="poisoned_loss", FROM=45, UNTIL=100000, FACTOR="nan",
    )  # fmt: skip
    assert process.wait() == 1
    assert 1 <= len(events(tmp_path, "rollback")) <= 3
    assert process.err.count("error: ") == 1
    assert "Traceback" not in process.err
    assert last_checkpoint(tmp_path).name == "step-00000040"
    checkpoint.verify(last_checkpoint(tmp_path))
    assert finite(tmp_path)


@pytest.mark.slow
@pytest.mark.row(20)
def test_weights_that_are_not_finite_replace_no_checkpoint(
    tiny_pretrain: Path, tmp_path: Path, program: Program
) -> None:
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "checkpoint.keep=1", patch="poisoned_weight", FROM=46
    )
    process.wait()
    assert finite(tmp_path)
    if process.returncode == 0:
        assert steps(tmp_path)[-1]["step"] == 60
        assert events(tmp_path, "rollback")


@pytest.mark.row(20)
@pytest.mark.slow
def test_a_rate_of_1000_is_not_a_success(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    process = program("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, "train.optimizer.lr=1000")
    assert process.wait() == 1
    assert "train.optimizer.lr" in process.err or "rate" in process.err


@pytest.mark.slow
@pytest.mark.row(21)
@pytest.mark.parametrize("choice", ["log", "skip"])
def test_a_jump_of_the_loss_is_said_and_skipped_by_choice(
    tiny_pretrain: Path, tmp_path: Path, program: Program, choice: str
) -> None:
    process = program(
        "pretrain", tiny_pretrain, f"run_dir={tmp_path}", *SHORT, f"train.guards.on_spike={choice}",
        patch="poisoned_loss", FROM=50, UNTIL=50, FACTOR=1000,
    )  # fmt: skip
    done(process)
    assert [line["step"] for line in steps(tmp_path) if line["skipped"]] == ([50] if choice == "skip" else [])
    said = [line for line in events(tmp_path, "spike") + events(tmp_path, "skip") if line["step"] == 50]
    assert said
    assert said[0]["message"] in process.out


@pytest.mark.slow
@pytest.mark.row(22)
def test_a_collapsed_router_is_named_with_its_layer(tiny_pretrain: Path, tmp_path: Path, program: Program) -> None:
    settings = (*SHORT, "train.steps=40", "train.balance.bias_update_rate=0")
    process = program("pretrain", tiny_pretrain, f"run_dir={tmp_path}", *settings, patch="two_experts_take_all")
    done(process)
    said = [line["message"] for line in events(tmp_path, "alarm")]
    assert any("layer 0" in text for text in said)
    assert any("layer 1" in text for text in said)
    assert all(text in process.out for text in said)
