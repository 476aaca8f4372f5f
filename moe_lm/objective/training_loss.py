"""The loss of a step: an objective, such as next-token prediction, and the balance terms of the routers.

Every term is a *part* of the step's loss: a sum over this micro-batch divided by counts of the whole global batch.
Parts add up over micro-batches and ranks, so neither accumulation nor the layout changes the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_lm.config.training import BalanceConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.model.attention import Attend, PackedAttention, segment_positions
from moe_lm.model.layers import ChunkLoss, Head, chunk_loss, likeliest, summed_nll, token_nll
from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.balance import OverRow, balance_loss, of_all_layers, routing_figures, whole
from moe_lm.objective.quantile_balance import needed_biases
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

    def score(self, predictions: Predictions, batch: Batch) -> Score:
        """The loss and the figures of a batch, given what the model predicts."""
        ...


class Predictions:
    """A model's predictions after every token: hidden states `[B, S, D]`, and the head that makes logits of them.

    They are measured without the logits of all positions in memory at once.
    """

    def __init__(self, head: Head, hidden_BSD: Tensor, loss: ChunkLoss = chunk_loss) -> None:
        self._head, self._hidden_BSD, self._loss = head, hidden_BSD, loss

    def nll(self, targets_BS: Tensor) -> Tensor:
        """Negative log-likelihood of every target in nats, `[B, S]` float32; 0 for IGNORE."""
        nll_BS: Tensor = self._head(self._hidden_BSD, token_nll, targets_BS, self._loss)
        return nll_BS

    def summed_nll(self, targets_BS: Tensor) -> Tensor:
        """The sum of `nll`, with a cheaper gradient, which can be taken once."""
        if not torch.is_grad_enabled():
            return self.nll(targets_BS).sum()
        nll: Tensor = self._head(self._hidden_BSD, summed_nll, targets_BS, self._loss)
        return nll

    @torch.no_grad()
    def logits(self, chosen_BS: Tensor) -> Tensor:
        """The logits after the few tokens that are chosen, `[chosen, V]` float32."""
        logits_CV: Tensor = self._head(self._hidden_BSD[chosen_BS])
        return logits_CV.float()

    @torch.no_grad()
    def likeliest(self) -> Tensor:
        """The likeliest token after every one, `[B, S]`."""
        tokens_BS: Tensor = self._head(self._hidden_BSD, likeliest)
        return tokens_BS


class NextToken:
    """Next-token prediction: the units are target tokens, the loss is their negative log-likelihood in nats."""

    def units(self, batch: Batch) -> int:
        return num_targets(batch)

    def score(self, predictions: Predictions, batch: Batch) -> Score:
        return Score(predictions.summed_nll(batch.targets), {}, {})


def num_targets(batch: Batch) -> int:
    """The number of positions that are trained on."""
    return int((batch.targets != IGNORE).sum())


@dataclass(frozen=True)
class StepCounts:
    """Sizes of the whole global batch of a step, over all its micro-batches and ranks."""

    units: int
    targets: int
    tokens: int  # without padding
    rows: int
    load: Tensor | None = None  # [layers, E] int64, of the step before, for the batch loss; None: an even one


class LossParts(NamedTuple):
    """One micro-batch's part of a step. Only `loss` has a gradient."""

    loss: Tensor
    balance: Tensor  # the balance terms within `loss`
    sums: dict[str, Tensor]  # "loss" and the further figures of the objective, each summed over the units
    values: dict[str, Tensor]  # values of single units
    load: Tensor  # [layers, E] int64, padding left out
    entropy: Tensor  # [layers], the router's, in nats, mean over the tokens
    needed: Tensor  # [layers, E, bins] int32, of quantile balancing; without it empty


class TrainingLoss(nn.Module):
    """The model and its loss in one forward pass, so that a wrapper (DDP, DeepSpeed) sees one call."""

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        balance: BalanceConfig,
        pad_id: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.balance = balance
        self.pad_id = pad_id
        self.dtype = dtype  # of matrix products; weights stay as they are
        self.chunk_loss, self.routing_figures = chunk_loss, routing_figures  # which may be compiled
        # Where ranks share the rows, another attention, and sums over the whole rows.
        self.attention: Callable[[Tensor, int], Attend] = PackedAttention
        self.over_row: OverRow = whole

    def forward(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        """The parts of a micro-batch; without `counts`, as in evaluation, `loss` is not divided and not balanced."""
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if batch.own_tokens is not None:
                with torch.no_grad():
                    batch = mixed(batch, self.predict(batch)[0].likeliest())
            predictions, routings = self.predict(batch)
            score = self.objective.score(predictions, batch)
        counted_BS = batch.input_ids != self.pad_id
        load, entropy = counted_BS.new_zeros(0, 0, dtype=torch.int64), score.loss.new_zeros(0)
        loss, balance = score.loss, torch.zeros_like(score.loss)
        if counts is not None:
            loss = score.loss / counts.units
        needed = load.new_zeros(0, 0, 0, dtype=torch.int32)
        if routings:
            before, routing = None if counts is None else counts.load, of_all_layers(routings)
            load, entropy, terms = self.routing_figures(routing, counted_BS, self.balance, before, self.over_row)
            if counts is not None and self.balance.bias_update == "quantile":
                biases = torch.stack([layer.gate.e_score_correction_bias for layer in self.model.moe_layers])
                needed = needed_biases(routing, biases, counted_BS.flatten())
            if counts is not None:
                balance = balance + balance_loss(terms, self.balance, counts.tokens, counts.rows)
                loss = loss + balance
        return LossParts(
            loss=loss,
            balance=balance.detach(),
            sums={"loss": score.loss.detach(), **score.figures},
            values=score.values,
            load=load,
            entropy=entropy,
            needed=needed,
        )

    def predict(self, batch: Batch) -> tuple[Predictions, list[Routing]]:
        """What the model predicts after every token, and what its routers decided."""
        # A row's length bounds every segment's; unlike batch.max_seqlen it is the same in every batch to compile for.
        attend = self.attention(batch.cu_seqlens, batch.input_ids.shape[1])
        positions_BS = segment_positions(batch.cu_seqlens, batch.input_ids.shape, batch.part_of_rows)
        hidden_BSD, routings = self.model.model(batch.input_ids, positions_BS, attend)
        return Predictions(self.model.lm_head, hidden_BSD, self.chunk_loss), routings

    def count(self, batches: Sequence[Batch]) -> dict[str, int]:
        """The sizes in `StepCounts` of these batches."""
        return {
            "units": sum(map(self.objective.units, batches)),
            "targets": sum(map(num_targets, batches)),
            "tokens": sum(int((batch.input_ids != self.pad_id).sum()) for batch in batches),
            "rows": sum(len(batch.input_ids) for batch in batches),
        }
