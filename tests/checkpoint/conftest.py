"""Two checkpoints, each of a state filled with its step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_lm.checkpoint import write


def state_of(value: int) -> dict[str, Tensor]:
    weight = torch.full((6, 5), float(value))
    return {"model.weight": weight, "exp_avg.weight": -weight}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder of two checkpoints, of steps 500 and 1000."""
    for step in (500, 1000):
        write.save(tmp_path / "checkpoints", step, state_of(step), {"config.yaml": f"step: {step}\n"})
    return tmp_path / "checkpoints"


@pytest.fixture
def newest(checkpoints: Path) -> Path:
    return checkpoints / "step-00001000"
