"""Runs of a sharded layout, by the command line: one that goes on is the same to the bit (FAULTS row 3); refusals.

`moe-lm verify` (tests/tools/verify) shows that a run moves between layouts as if it had never moved (row 4).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe_lm.checkpoint.read import CheckpointTensors
from tests.processes import layout, metrics
from tests.runs import copy_as_of, last_checkpoint

RunRanks = Callable[..., list[Any]]

SETTINGS = (
    "train.optimizer.name=adamw", "train.optimizer.lr=0.003", "train.steps=14", "train.schedule.warmup_steps=3",
    "train.clip_norm=0.5", "train.optimizer.ema_decay=0.9", "checkpoint.every=4", "checkpoint.keep=9",
)  # fmt: skip


def succeeded(ranks: list[Any]) -> bool:
    """Every rank ended well and without a complaint."""
    return [(rank.code, rank.err) for rank in ranks] == [(0, "")] * len(ranks)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, of each file of each rank."""
    folder = run_dir / "checkpoints" / "step-00000014"
    return {f"{file.name}/{n}": t for file in folder.rglob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_layout_goes_on_to_the_bit(
    tiny_pretrain: Path, tmp_path: Path, run_ranks: RunRanks, zero_stage: int
) -> None:
    arguments = ("pretrain", tiny_pretrain, *SETTINGS, *layout(2, zero_stage))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert succeeded(run_ranks(2, *arguments, f"run_dir={whole}"))
    copy_as_of(4, whole, resumed)
    assert succeeded(run_ranks(2, *arguments, f"run_dir={resumed}"))
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(resumed)]
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_the_moving_average_over_ranks_is_that_of_one_process(
    tiny_pretrain: Path, tmp_path: Path, run_ranks: RunRanks, moe_lm: Callable[..., Any]
) -> None:
    arguments = ("pretrain", tiny_pretrain, *SETTINGS)
    assert moe_lm(*arguments, f"run_dir={tmp_path / 'one'}").code == 0
    assert succeeded(run_ranks(2, *arguments, *layout(2, 2), f"run_dir={tmp_path / 'two'}"))
    for run in ("one", "two"):
        assert moe_lm("merge", tmp_path / run, "--ema", "--run-dir", tmp_path / f"{run}-ema").code == 0
    one, two = (CheckpointTensors(last_checkpoint(tmp_path / f"{run}-ema")) for run in ("one", "two"))
    for name in one.names():
        rows = one.shape(name)[0]
        torch.testing.assert_close(two.rows(name, 0, rows), one.rows(name, 0, rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            layout(4, 1),
            "parallel.expert_parallel_size=4 does not divide the 2 processes of this run; choose a divisor",
        ),
        (
            (*layout(2, 1), "model.n_routed_experts=9"),
            "expert_parallel_size=2 does not divide model.n_routed_experts=9",
        ),
        (
            ("train.global_batch_size=12", "train.micro_batch_size=4"),
            "train.micro_batch_size=4 does not divide the 6 sequences of a rank",
        ),
        (("--bogus",), "No such option: --bogus"),
        ((*layout(2, 3), "train.compile=true"), "train.compile=true does not go with parallel.zero_stage=3"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    tiny_pretrain: Path, tmp_path: Path, run_ranks: RunRanks, settings: tuple[str, ...], said: str
) -> None:
    ranks = run_ranks(2, "pretrain", tiny_pretrain, *SETTINGS, f"run_dir={tmp_path}", *settings)
    assert [rank.code for rank in ranks] == [2, 2]
    (line,) = "".join(rank.err for rank in ranks).splitlines()
    assert said in line
