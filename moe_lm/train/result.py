"""Where a run stands: its step, its losses, the best of them, and what is still to be done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from moe_lm.train.checkpoints import MEASURED_LATER


class Best(NamedTuple):
    """The evaluation with the lowest held-out loss."""

    step: int
    loss: float


@dataclass
class TrainingResult:
    """Where a run stands; `stopped` if a signal or the time left something to do: steps, or the last evaluation."""

    step: int = 0
    tokens: int = 0  # that went through the model in the steps so far
    stopped: bool = False
    loss: float = math.nan
    validation_loss: float | None = None  # of this step: nats per token, or the mean loss of a pair
    best: Best | None = None
    evaluations_since_best: int = 0
    owes_archive: bool = False  # a checkpoint to archive was due in trouble, so the next good one is archived
    checkpoint: Path | None = None  # of the end

    def ended_early(self) -> str:
        """When and why the run ended before its last step, in words."""
        count = self.evaluations_since_best
        return f"ended early after step {self.step}: {count} evaluations without a lower held-out loss"

    def counters(self) -> dict[str, Any]:
        """What trainer.json holds of it."""
        best = {"step": self.best.step, "loss": self.best.loss} if self.best else None
        return {
            "step": self.step, "tokens": self.tokens, "loss": self.loss, "validation_loss": self.validation_loss,
            "best": best, "evaluations_since_best": self.evaluations_since_best, "owes_archive": self.owes_archive,
        }  # fmt: skip

    def restore(self, counters: Mapping[str, Any]) -> None:
        """Continue from the counters of a checkpoint; empty ones are those of the start."""
        self.step, self.tokens = int(counters.get("step", 0)), int(counters.get("tokens", 0))
        self.loss = math.nan if counters.get("loss") is None else float(counters["loss"])
        self.validation_loss = counters.get("validation_loss")
        self.best = Best(**counters["best"]) if counters.get("best") else None
        self.evaluations_since_best = counters.get("evaluations_since_best", 0)
        self.owes_archive = counters.get("owes_archive", False)
        if self.validation_loss is None and counters.get(MEASURED_LATER) is not None:
            self.note_evaluation(counters[MEASURED_LATER])

    def note_step(self, loss: float, tokens: int) -> None:
        """Count a step, which is not evaluated yet."""
        self.step += 1
        self.tokens += tokens
        self.loss, self.validation_loss = loss, None

    def note_evaluation(self, loss: float) -> bool:
        """Note the held-out loss at this step; returns whether it is the lowest so far."""
        self.validation_loss = loss
        better = self.best is None or loss < self.best.loss
        if better and math.isfinite(loss):
            self.best, self.evaluations_since_best = Best(self.step, loss), 0
            return True
        self.evaluations_since_best += 1
        return False
