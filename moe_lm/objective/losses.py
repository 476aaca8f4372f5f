"""What training minimises: next-token cross-entropy or a loss of preferences, and the router's balance losses.

Every term is a *part* of the step's loss: a sum over this micro-batch divided by counts of the whole global batch.
Parts add up over micro-batches and ranks, so neither accumulation nor the layout changes the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.training import BalanceConfig, PreferenceConfig
from moe_lm.data.batches import IGNORE, Batch
from moe_lm.model.attention import PackedAttention
from moe_lm.model.moe import expert_counts
from moe_lm.model.transformer import LanguageModel, ModelOutput
from moe_lm.objective.balance import batch_balance_loss, router_entropy, router_z_loss, sequence_balance_loss
from moe_lm.objective.preference import FIGURES, answer_log_probs, figure_sums, pair_losses
from moe_lm.objective.scheduled_sampling import mixed


@dataclass(frozen=True)
class StepCounts:
    """Sizes of the whole global batch of a step, over all its micro-batches and ranks."""

    targets: int
    tokens: int  # without padding
    rows: int
    load: Tensor | None = None  # [layers, E]; given when the batch loss must know it ahead of several micro-batches
    pairs: int | None = None  # given when preferences are tuned

    @property
    def units(self) -> int:
        """What the loss is a mean over: target tokens, or pairs."""
        return self.targets if self.pairs is None else self.pairs


class LossParts(NamedTuple):
    """One micro-batch's part of a step; everything but `loss` is detached."""

    loss: Tensor
    objective_sum: Tensor  # summed over the units: nats of the target tokens, or the losses of the pairs
    balance: Tensor  # the part of `loss` that is not cross-entropy
    load: Tensor  # [layers, E] int64, padding left out
    entropy: Tensor  # [layers], the router's, nats, mean over the tokens
    log_probs: Tensor  # [pairs, 2], of the answers, nats; [0, 2] without pairs


class TrainingLoss(nn.Module):
    """The model and its loss in one forward pass, so that what wraps it (DDP, DeepSpeed) sees one call."""

    def __init__(
        self,
        model: LanguageModel,
        balance: BalanceConfig,
        pad_id: int,
        dtype: torch.dtype = torch.float32,
        preference: PreferenceConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.balance = balance
        self.pad_id = pad_id
        self.dtype = dtype  # of matrix products; weights stay as they are
        self.preference = preference  # None: every target token is to be learnt
        # The engine puts its own here: a compiled one, and one that sums over the ranks.
        self.nll: Callable[[Tensor, Tensor], Tensor] = next_token_nll
        self.all_reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor

    def forward(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        """The parts of a micro-batch; without `counts`, as in evaluation, `loss` is not divided and not balanced."""
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if batch.own_tokens is not None:
                with torch.no_grad():
                    batch = mixed(batch, self.run_model(batch).logits)
            return self._parts(batch, counts)

    def _parts(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        output = self.run_model(batch)
        objective_sum, log_probs = self._objective(output.logits, batch)
        load = self.load(batch, output)
        balance = objective_sum.new_zeros(()) if counts is None else self._balance_loss(batch, output, counts, load)
        with torch.no_grad():
            entropies = [router_entropy(routing) for routing in output.routings]
        return LossParts(
            loss=objective_sum if counts is None else objective_sum / counts.units + balance,
            objective_sum=objective_sum.detach(),
            balance=balance.detach(),
            load=load,
            entropy=torch.stack(entropies) if entropies else objective_sum.new_zeros(0),
            log_probs=log_probs.detach(),
        )

    def _objective(self, logits_BSV: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is minimised but for balance, summed over the units, and the log-probabilities of answers, [P, 2]."""
        if self.preference is None:
            nll_sum = self.nll(logits_BSV, batch.targets)
            return nll_sum, nll_sum.new_zeros(0, 2)
        assert batch.reference is not None
        log_probs, lengths = answer_log_probs(logits_BSV, batch)
        return pair_losses(log_probs, lengths, batch.reference, self.preference).sum(), log_probs

    @property
    def figure_names(self) -> tuple[str, ...]:
        """What `figure_sums` gives."""
        return () if self.preference is None else FIGURES

    def figure_sums(self, parts: LossParts, batch: Batch) -> Tensor:
        """Further figures of a micro-batch, summed over its units."""
        if self.preference is None or batch.reference is None:
            return parts.objective_sum.new_zeros(0)
        return figure_sums(parts.log_probs, batch.reference, self.preference)

    def run_model(self, batch: Batch) -> ModelOutput:
        # A row's length bounds every segment's; unlike batch.max_seqlen it is the same in every batch to compile for.
        attend = PackedAttention(batch.cu_seqlens, batch.input_ids.shape[1])
        return self.model(batch.input_ids, batch.position_ids, attend)

    def load(self, batch: Batch, output: ModelOutput) -> Tensor:
        """Tokens an expert of every MoE layer got from this micro-batch: `[layers, E]` int64."""
        if not output.routings:
            return torch.zeros(0, 0, dtype=torch.int64, device=batch.input_ids.device)
        counted_T = (batch.input_ids != self.pad_id).flatten()
        experts = self.model.config.n_routed_experts
        return torch.stack([expert_counts(routing.experts, experts, counted_T) for routing in output.routings])

    def _balance_loss(self, batch: Batch, output: ModelOutput, counts: StepCounts, load: Tensor) -> Tensor:
        """The weighted balance terms, summed over the layers."""
        weights = self.balance
        counted_BS = batch.input_ids != self.pad_id
        counted_T = counted_BS.flatten().float()
        total = counted_T.new_zeros(())
        if weights.sequence_loss:
            terms = [sequence_balance_loss(routing, counted_BS) for routing in output.routings]
            total = total + weights.sequence_loss * sum(terms) / counts.rows
        if weights.batch_loss and output.routings:
            load = self.all_reduce(load) if counts.load is None else counts.load
            terms = [batch_balance_loss(r, counted_T, load[i]) for i, r in enumerate(output.routings)]
            total = total + weights.batch_loss * sum(terms) / counts.tokens
        if weights.z_loss:
            terms = [router_z_loss(routing, counted_T) for routing in output.routings]
            total = total + weights.z_loss * sum(terms) / counts.tokens
        return total


def next_token_nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihood of the targets in nats, summed in float32; IGNORE targets count nothing."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten(), ignore_index=IGNORE, reduction="sum")
