"""Checkpoints across layouts, by the command line: a run that moves between expert-parallel sizes, ZeRO stages and
engines goes on as if it had never moved (FAULTS row 4), and one that stays is the same to the bit (row 3)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import metrics, train_alone

RunRanks = Callable[..., list[Any]]

SETTINGS = (
    "train.optimizer.name=adamw", "train.optimizer.lr=0.003", "train.steps=14", "train.schedule.warmup_steps=3",
    "train.clip_norm=0.5", "checkpoint.every=4", "checkpoint.keep=9",
)  # fmt: skip


def layout(expert_parallel_size: int, zero_stage: int) -> tuple[str, ...]:
    return (
        "parallel.engine=deepspeed",
        f"parallel.expert_parallel_size={expert_parallel_size}",
        f"parallel.zero_stage={zero_stage}",
    )


@pytest.fixture(scope="module")
def one_process(tiny_pretrain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that never changes its layout, in one process without DeepSpeed."""
    return train_alone(tiny_pretrain, tmp_path_factory.mktemp("one"), *SETTINGS)


def succeeded(ranks: list[Any]) -> bool:
    """Every rank ended well and without a complaint."""
    return [(rank.code, rank.err) for rank in ranks] == [(0, "")] * len(ranks)


def move(source: Path, target: Path) -> Path:
    """A run folder as it was when step 4 had been saved."""
    (target / "checkpoints").mkdir(parents=True)
    shutil.copytree(source / "checkpoints" / "step-00000004", target / "checkpoints" / "step-00000004")
    lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    return target


def assert_same_run(found: Path, expected: Path) -> None:
    """The same losses, gradient norms, counts and experts' loads in every step, each step once."""
    lines, others = metrics(found), metrics(expected)
    assert [line["step"] for line in lines] == list(range(1, 15))
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
        assert (line["tokens"], line["targets"], line["lr"]) == (other["tokens"], other["targets"], other["lr"])
        for layer, other_layer in zip(line["experts"], other["experts"], strict=True):
            assert layer["max_over_mean"] == other_layer["max_over_mean"]
    assert any(line["grad_norm"] > 0.5 for line in lines), "clipping never acted"


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, of each file of each rank."""
    folder = run_dir / "checkpoints" / "step-00000014"
    return {f"{file.name}/{n}": t for file in folder.rglob("*.safetensors") for n, t in load_file(file).items()}


def test_a_run_moves_through_layouts_and_engines(
    tiny_pretrain: Path, tmp_path: Path, one_process: Path, run_ranks: RunRanks, moe_lm: Callable[..., Any]
) -> None:
    """EP 4, ZeRO 2 -> EP 2, ZeRO 3 -> one process on Accelerate -> EP 1, ZeRO 1 over two; each from step 4."""
    arguments = ("pretrain", tiny_pretrain, *SETTINGS)
    runs = [tmp_path / name for name in ("ep4", "ep2", "one", "two")]
    assert succeeded(run_ranks(4, *arguments, f"run_dir={runs[0]}", *layout(4, 2)))
    assert_same_run(runs[0], one_process)
    moves: list[tuple[int, tuple[str, ...]]] = [(2, layout(2, 3)), (1, ("parallel.engine=torch",)), (2, layout(1, 1))]
    for source, target, (ranks, settings) in zip(runs, runs[1:], moves, strict=False):
        move(source, target)
        assert succeeded(run_ranks(ranks, *arguments, f"run_dir={target}", *settings))
        assert "going on after step 4 of 14" in (target / "train.log").read_text(encoding="utf-8")
        assert_same_run(target, one_process)

    done = moe_lm("sample", runs[0], "--prompt", "x", "--max-new-tokens", 5, "--greedy")
    assert done.code == 0
    assert done.out == moe_lm("sample", one_process, "--prompt", "x", "--max-new-tokens", 5, "--greedy").out


@pytest.mark.parametrize("zero_stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_layout_goes_on_to_the_bit(
    tiny_pretrain: Path, tmp_path: Path, run_ranks: RunRanks, zero_stage: int
) -> None:
    arguments = ("pretrain", tiny_pretrain, *SETTINGS, *layout(2, zero_stage))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert succeeded(run_ranks(2, *arguments, f"run_dir={whole}"))
    move(whole, resumed)
    assert succeeded(run_ranks(2, *arguments, f"run_dir={resumed}"))
    assert [line["loss"] for line in metrics(whole)] == [line["loss"] for line in metrics(resumed)]
    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (layout(4, 1), "parallel.expert_parallel_size=4 does not divide the 2 processes of this run; choose a divisor"),
        (
            (*layout(2, 1), "model.n_routed_experts=9"),
            "expert_parallel_size=2 does not divide model.n_routed_experts=9",
        ),
        ((*layout(2, 1), "train.optimizer.name=muon"), "train.optimizer.name=muon needs whole matrices"),
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
