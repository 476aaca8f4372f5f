"""The engine: what turns micro-batches into a step, whatever runs underneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_lm.data.batches import Batch
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """A finished optimizer step, over the whole global batch."""

    loss: float  # nats a target token
    balance_loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    targets: int  # tokens that were predicted
    tokens: int  # tokens that went through the model, without padding
    skipped: bool  # the loss or the gradient was not finite: nothing was changed
    load: Tensor  # [layers, E] int64 on the CPU, tokens an expert
    entropy: Tensor  # [layers], the router's, nats
    bias_range: list[float]  # largest minus smallest router bias a layer


class Engine(Protocol):
    """Hides accumulation, precision, clipping, the optimizer and the schedule from the loop."""

    topology: Topology
    device: torch.device
    dtype: torch.dtype
    model: LanguageModel

    def train_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on this rank's micro-batches of global step `step` (counted from 0)."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """Negative log-likelihood in nats and number of targets of all batches, shared out over the ranks."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The logical tensors of a checkpoint: `model.*`, optimizer states by parameter name, random states."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from tensors that `state()` gave, after a checkpoint filled them."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank raised its flag."""
        ...

    def close(self) -> None:
        """Part from the other ranks, after the last step and checkpoint."""
        ...
