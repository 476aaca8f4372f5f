"""The losses of 100 steps are those of `tiny_moe.json`. To move them on purpose: `python -m tests.golden.make`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.make import golden_losses

HERE = Path(__file__).parent
# Other vector instructions moved a loss by 2e-6 of itself, and the held-out one by 6e-6.
TOLERANCE = 1e-4


def test_golden_100_step_losses(tmp_path: Path) -> None:
    golden = json.loads((HERE / "tiny_moe.json").read_text(encoding="utf-8"))
    assert golden_losses(tmp_path) == pytest.approx(golden, rel=TOLERANCE)
