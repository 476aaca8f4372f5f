"""Run folders: what a checkpoint of theirs holds, and that two of them are the same to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.processes import metrics

MoeLm = Callable[..., Any]  # the fixture `moe_lm`
CLOCK = {  # figures of the machine, not of what is computed
    "time", "tokens_per_second", "seconds", "data_seconds", "reading_seconds", "memory_bytes", "host_bytes",
    "device_bytes",
}  # fmt: skip


def tensors(checkpoint: Path, part: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, or of its `part`: model or optimizer."""
    files = (checkpoint / part).rglob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def last_checkpoint(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").iterdir())


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The figures of every step that do not depend on the machine."""
    return [{name: value for name, value in line.items() if name not in CLOCK} for line in metrics(run_dir)]


def copy_as_of(step: int, source: Path, target: Path) -> Path:
    """A copy of a run folder as it was when this step had been saved."""
    name = f"step-{step:08d}"
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    lines = (source / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    until = [line for line in lines if json.loads(line)["step"] <= step]
    (target / "metrics.jsonl").write_text("".join(until), encoding="utf-8")
    return target


def assert_same_run(one: Path, other: Path) -> None:
    """The figures of every step and the last checkpoints are equal to the bit."""
    assert figures(one) == figures(other)
    expected, found = last_checkpoint(one), last_checkpoint(other)
    assert expected.name == found.name
    weights, others = tensors(expected), tensors(found)
    assert {name.split(".")[0] for name in weights} >= {"model", "exp_avg", "random"}
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    for name in ("trainer.json", "model.yaml", "tokenizer/tokenizer.json"):
        assert (expected / name).read_text() == (found / name).read_text()


def assert_resumes_to_the_bit(moe_lm: MoeLm, tmp_path: Path, config: Path, *settings: str) -> None:
    """12 steps of fine-tuning at once are 12 steps of which all after the fifth are lost, and done again."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert moe_lm("finetune", config, f"run_dir={whole}", *settings).code == 0
    command = ("finetune", config, f"run_dir={parted}", "checkpoint.every=5", "checkpoint.keep=9", *settings)
    assert moe_lm(*command).code == 0
    for lost in ("step-00000012", "step-00000010"):
        shutil.rmtree(parted / "checkpoints" / lost)
    assert "going on after step 5 of 12" in moe_lm(*command).out
    assert_same_run(whole, parted)
