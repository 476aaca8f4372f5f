"""Adapters across layouts: whatever ranks divide and whatever is frozen, they are trained as in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from tests.processes import layout, metrics
from tests.runs import copy_as_of

RunRanks = Callable[..., list[Any]]
MoeLm = Callable[..., Any]
STEPS, SAVED = 8, 4
TORCH = ("parallel.engine=torch",)


@pytest.fixture
def lora_config(finetune_config: Path) -> Path:
    """All that a layout could get wrong at once: dropout, a rank that is not a multiple of 8, a trained router."""
    values = yaml.safe_load(finetune_config.read_text())
    values["lora"] = {"rank": 4, "dropout": 0.2}
    values["train"] |= {
        "steps": STEPS, "optimizer": {"lr": 0.003, "eps": 1e-6}, "freeze_router": False, "clip_norm": 0.5,
        "balance": {"batch_loss": 0.01, "z_loss": 0.001, "bias_update_rate": 0.01},
    }  # fmt: skip
    values["checkpoint"] = {"every": SAVED, "keep": 9}
    finetune_config.write_text(yaml.safe_dump(values))
    return finetune_config


def train(
    run_ranks: RunRanks, config: Path, run: Path, ranks: int, *settings: str, goes_on_from: Path | None = None
) -> Path:
    """A run in this many processes; it goes on from the middle checkpoint of another run if that is given."""
    if goes_on_from is not None:
        copy_as_of(SAVED, goes_on_from, run)
    done = run_ranks(ranks, "finetune", config, f"run_dir={run}", *settings)
    assert [(rank.code, rank.err) for rank in done] == [(0, "")] * ranks
    return run


def assert_same_training(found: Path, expected: Path) -> None:
    lines, others = metrics(found), metrics(expected)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, tolerance in (("loss", 2e-6), ("val_loss", 2e-6), ("grad_norm", 1e-3)):
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=tolerance), (found.name, line["step"], name)


def saved_names(run: Path) -> set[str]:
    folder = run / "checkpoints" / f"step-{STEPS:08d}"
    return {name for file in folder.rglob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118


@pytest.mark.slow
def test_a_run_of_adapters_moves_to_another_engine_and_leaves_its_base_out(
    lora_config: Path, tmp_path: Path, run_ranks: RunRanks, moe_lm: MoeLm
) -> None:
    """With dropout, a trained router and clipping; `moe-lm verify` compares more layouts of adapters."""
    expected = train(run_ranks, lora_config, tmp_path / "one", 1, *TORCH)
    assert any(line.get("grad_norm", 0) > 0.5 for line in metrics(expected)), "clipping never acted"
    sharded = train(run_ranks, lora_config, tmp_path / "zero 3", 2, *layout(2, 3))
    moved = train(run_ranks, lora_config, tmp_path / "two", 2, *TORCH, goes_on_from=sharded)
    for run in (sharded, moved):
        assert_same_training(run, expected)
        assert saved_names(run) == saved_names(expected)
    assert any(name.endswith("experts.up_proj_lora_B") for name in saved_names(sharded))
    assert not any(name.endswith("experts.up_proj") for name in saved_names(sharded))
    said = [
        moe_lm("sample", run, "--prompt", "x", "--max-new-tokens", 8, "--greedy").out for run in (sharded, expected)
    ]
    assert said[0] == said[1]


@pytest.mark.slow
def test_experts_are_trained_as_in_one_process_when_all_else_is_frozen(
    lora_config: Path, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Their gradients are too small for the gate, which insists on clipping."""
    settings = ("lora.targets=[experts]", "train.freeze_router=true")
    expected = train(run_ranks, lora_config, tmp_path / "one", 1, *TORCH, *settings)
    sharded = train(run_ranks, lora_config, tmp_path / "zero 3", 2, *layout(2, 3), *settings)
    assert_same_training(sharded, expected)
    assert saved_names(sharded) == saved_names(expected)
