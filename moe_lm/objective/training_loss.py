"""The loss of a step: an objective, such as next-token prediction, and the balance terms of the routers.

Every term is a *part* of the step's loss: a sum over this micro-batch divided by counts of the whole global batch.
Parts add up over micro-batches and ranks, so neither accumulation nor the layout changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.training import BalanceConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.model.attention import PackedAttention
from moe_lm.model.transformer import LanguageModel, ModelOutput
from moe_lm.objective.balance import balance_loss, expert_load, router_entropies
from moe_lm.objective.scheduled_sampling import mixed


class Score(NamedTuple):
    """An objective's loss and figures of one batch. Only `loss` has a gradient."""

    loss: Tensor  # float32, summed over the units
    figures: dict[str, Tensor]  # further figures for the log, each summed over the units
    values: dict[str, Tensor]  # values of single units, such as the log-probabilities of a pair


class Objective(Protocol):
    """The quantity that training minimises: the mean loss over the units of the global batch."""

    def units(self, batch: Batch) -> int:
        """The number of units in a batch: target tokens, or pairs."""
        ...

    def score(self, logits_BSV: Tensor, batch: Batch) -> Score:
        """The loss and the figures of a batch, given the model's logits."""
        ...


class NextToken:
    """Next-token prediction: the units are target tokens, the loss is their negative log-likelihood in nats."""

    def __init__(self, compiled: bool = False) -> None:
        self._nll: Callable[[Tensor, Tensor], Tensor] = torch.compile(next_token_nll) if compiled else next_token_nll

    def units(self, batch: Batch) -> int:
        return num_targets(batch)

    def score(self, logits_BSV: Tensor, batch: Batch) -> Score:
        return Score(self._nll(logits_BSV, batch.targets), {}, {})


def num_targets(batch: Batch) -> int:
    """The number of positions that are trained on."""
    return int((batch.targets != IGNORE).sum())


def next_token_nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihood of the targets in nats, summed in float32; IGNORE targets count nothing."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")


@dataclass(frozen=True)
class StepCounts:
    """Sizes of the whole global batch of a step, over all its micro-batches and ranks."""

    units: int
    targets: int
    tokens: int  # without padding
    rows: int
    load: Tensor | None = None  # [layers, E] int64; given when it was counted ahead of the micro-batches


class LossParts(NamedTuple):
    """One micro-batch's part of a step. Only `loss` has a gradient."""

    loss: Tensor
    balance: Tensor  # the balance terms within `loss`
    sums: dict[str, Tensor]  # "loss" and the further figures of the objective, each summed over the units
    values: dict[str, Tensor]  # values of single units
    load: Tensor  # [layers, E] int64, padding left out
    entropy: Tensor  # [layers], the router's, in nats, mean over the tokens


class TrainingLoss(nn.Module):
    """The model and its loss in one forward pass, so that a wrapper (DDP, DeepSpeed) sees one call."""

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        balance: BalanceConfig,
        pad_id: int,
        dtype: torch.dtype = torch.float32,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.balance = balance
        self.pad_id = pad_id
        self.dtype = dtype  # of matrix products; weights stay as they are
        self._sum_over_ranks = sum_over_ranks  # None in a single process

    def forward(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        """The parts of a micro-batch; without `counts`, as in evaluation, `loss` is not divided and not balanced."""
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if batch.own_tokens is not None:
                with torch.no_grad():
                    batch = mixed(batch, self.run_model(batch).logits)
            logits_BSV, routings = self.run_model(batch)
            score = self.objective.score(logits_BSV, batch)
        counted_BS = batch.input_ids != self.pad_id
        load = expert_load(routings, counted_BS)
        loss, balance = score.loss, torch.zeros_like(score.loss)
        if counts is not None:
            global_load = self._global_load(load, counts)
            balance = balance_loss(routings, counted_BS, self.balance, global_load, counts.tokens, counts.rows)
            loss = score.loss / counts.units + balance
        return LossParts(
            loss=loss,
            balance=balance.detach(),
            sums={"loss": score.loss.detach(), **score.figures},
            values=score.values,
            load=load,
            entropy=router_entropies(routings, load.device),
        )

    def run_model(self, batch: Batch) -> ModelOutput:
        # A row's length bounds every segment's; unlike batch.max_seqlen it is the same in every batch to compile for.
        attend = PackedAttention(batch.cu_seqlens, batch.input_ids.shape[1])
        return self.model(batch.input_ids, batch.position_ids, attend)

    def count(self, batches: Sequence[Batch]) -> dict[str, int]:
        """The sizes in `StepCounts` of these batches."""
        return {
            "units": sum(map(self.objective.units, batches)),
            "targets": sum(map(num_targets, batches)),
            "tokens": sum(int((batch.input_ids != self.pad_id).sum()) for batch in batches),
            "rows": sum(len(batch.input_ids) for batch in batches),
        }

    def needs_load_ahead(self, micro_batches: int) -> bool:
        """Whether the first of several micro-batches needs the load of the whole global batch: for the batch loss."""
        return bool(self.balance.batch_loss) and micro_batches > 1

    def _global_load(self, load: Tensor, counts: StepCounts) -> Tensor:
        """The load of the whole global batch; only the batch loss needs it."""
        if counts.load is not None:
            return counts.load
        if self._sum_over_ranks is None or not (self.balance.batch_loss and load.numel()):
            return load
        return self._sum_over_ranks(load)
