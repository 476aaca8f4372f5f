"""The engine: what turns micro-batches into a step, whatever runs underneath."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.common.errors import UsageError
from moe_lm.config.training import PreferenceConfig, TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.kernels.device import compiling_needs
from moe_lm.model.lora import draw_dropout
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.losses import LossParts, StepCounts, TrainingLoss, next_token_nll
from moe_lm.optim.groups import schedule_factor, update_router_biases
from moe_lm.parallel.process_group import all_reduce_sum, any_rank
from moe_lm.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """A finished optimizer step, over the whole global batch."""

    loss: float  # nats a target token, or a mean over the pairs
    balance_loss: float
    grad_norm: float  # before clipping
    learning_rate: float
    targets: int  # tokens that were predicted
    tokens: int  # tokens that went through the model, without padding
    skipped: bool  # the loss or the gradient was not finite: nothing was changed
    load: Tensor  # [layers, E] int64 on the CPU, tokens an expert
    entropy: Tensor  # [layers], the router's, nats
    bias_range: list[float]  # largest minus smallest router bias a layer
    figures: dict[str, float]  # of pairs: margin, accuracy, rewards


class Update(NamedTuple):
    """What an engine's optimizer did."""

    grad_norm: float  # global, over every parameter of the model, before clipping
    skipped: bool


class Evaluation(NamedTuple):
    """Sums over what was evaluated; a unit is a target token (nats) or a pair."""

    objective_sum: float
    units: int
    figure_sums: list[float]  # named by `TrainingLoss.figure_names`


class Engine(ABC):
    """Hides accumulation, precision, clipping, the optimizer and the schedule from the loop.

    Every rank is a data-parallel rank with rows of its own, whatever else its layout divides.
    """

    topology: Topology
    device: torch.device
    dtype: torch.dtype
    model: LanguageModel
    loss: TrainingLoss
    config: TrainConfig
    on_progress: Callable[[], None] = staticmethod(lambda: None)  # called at every step and evaluation batch
    on_gradients: Callable[[], None] | None = None  # called after the last backward pass, before clipping

    def train_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        """One optimizer step on this rank's micro-batches of global step `step` (counted from 0)."""
        self.on_progress()
        self.loss.train()
        draw_dropout(self.model, self.config.seed, step)
        micro_batches = [self._place(batch) for batch in micro_batches]
        counts = self._step_counts(micro_batches)
        parts, sums_of = [], []
        for number, batch in enumerate(micro_batches, 1):
            part = self._accumulate(batch, counts, last=number == len(micro_batches))
            parts.append(part._replace(loss=part.loss.detach()))
            sums_of.append(
                torch.cat((part.objective_sum[None], part.balance[None], self.loss.figure_sums(part, batch)))
            )
        if self.on_gradients is not None:
            self.on_gradients()
        sums = all_reduce_sum(torch.stack(sums_of).sum(0))
        load = all_reduce_sum(torch.stack([part.load for part in parts]).sum(0))
        entropy = all_reduce_sum(torch.stack([part.entropy for part in parts]).mean(0)) / self.topology.world_size
        factor = schedule_factor(step, self.config.steps, self.config.schedule)
        # Loss and gradient were summed over the ranks: when one is not finite, every rank sees it and skips alike.
        update = self._update(factor, finite=math.isfinite(sums[0]))
        if not update.skipped and self.config.balance.bias_update_rate:
            update_router_biases(self.model, load, self.config.balance.bias_update_rate)
        biases = [layer.gate.e_score_correction_bias for layer in self.model.moe_layers]
        return StepResult(
            loss=float(sums[0]) / counts.units,
            balance_loss=float(sums[1]),
            grad_norm=update.grad_norm,
            learning_rate=self.config.optimizer.lr * factor,
            targets=counts.targets,
            tokens=counts.tokens,
            skipped=update.skipped,
            load=load.cpu(),
            entropy=entropy.float().cpu(),
            bias_range=[float(bias.max() - bias.min()) for bias in biases],
            figures=dict(zip(self.loss.figure_names, (sums[2:] / counts.units).tolist(), strict=True)),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """The losses of all batches, shared out over the ranks."""
        sums = torch.zeros(2 + len(self.loss.figure_names), dtype=torch.float64)
        for _, batch, part in self._forward_shares(batches):
            units = batch.num_targets if self.loss.preference is None else batch.num_pairs
            sums[0] += part.objective_sum.cpu()
            sums[1] += units
            sums[2:] += self.loss.figure_sums(part, batch).cpu()
        if self.topology.world_size > 1:
            sums = all_reduce_sum(sums.to(self.device))
        objective_sum, units, *figure_sums = sums.tolist()
        return Evaluation(objective_sum, int(units), figure_sums)

    @torch.no_grad()
    def answer_log_probs(self, batches: Sequence[Batch]) -> Tensor:
        """Log-probabilities of the answers of all pairs, in the order of the batches: [pairs, 2] on the host."""
        bounds = [0, *accumulate(batch.num_pairs for batch in batches)]
        found = torch.zeros(bounds[-1], 2, device=self.device)
        for number, _, part in self._forward_shares(batches):
            found[bounds[number] : bounds[number + 1]] = part.log_probs
        return all_reduce_sum(found).cpu()

    def _forward_shares(self, batches: Sequence[Batch]) -> Iterator[tuple[int, Batch, LossParts]]:
        """This rank's share of the batches, with their places; nothing is trained."""
        self.on_progress()
        self.loss.eval()
        for start in range(0, len(batches), self.topology.world_size):
            # Tokens travel between ranks, so a rank without a batch of its own runs one that does not count.
            mine = start + self.topology.rank
            batch = self._place(batches[mine if mine < len(batches) else start])
            part = self._forward(batch, None)
            if mine < len(batches):
                yield mine, batch, part

    @torch.no_grad()
    def _step_counts(self, micro_batches: Sequence[Batch]) -> StepCounts:
        targets = sum(batch.num_targets for batch in micro_batches)
        tokens = sum(int((batch.input_ids != self.loss.pad_id).sum()) for batch in micro_batches)
        rows = sum(len(batch.input_ids) for batch in micro_batches)
        pairs = sum(batch.num_pairs for batch in micro_batches)
        total = all_reduce_sum(torch.tensor([targets, tokens, rows, pairs], device=self.device)).tolist()
        counts = StepCounts(
            targets=max(1, total[0]),
            tokens=max(1, total[1]),
            rows=total[2],
            pairs=None if self.loss.preference is None else max(1, total[3]),
        )
        if self.config.balance.batch_loss and len(micro_batches) > 1:
            # The batch loss needs the load of the whole global batch before the first gradient: one pass ahead.
            loads = [self._forward(batch, None).load for batch in micro_batches]
            return replace(counts, load=all_reduce_sum(torch.stack(loads).sum(0)))
        return counts

    def _place(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        if self.config.compile:
            # The number of documents differs from batch to batch; nothing else does.
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return batch

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank raised its flag."""
        return any_rank(flag, self.device)

    @abstractmethod
    def _forward(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        """The wrapped `TrainingLoss`, in the engine's precision."""

    @abstractmethod
    def _accumulate(self, batch: Batch, counts: StepCounts, last: bool) -> LossParts:
        """Forward and backward; after the `last` one every rank's gradients are summed."""

    @abstractmethod
    def _update(self, factor: float, finite: bool) -> Update:
        """Clip, step at `factor` of the peak rates, drop the gradients. No step when the loss or norm is not finite."""

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen, by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter, named and divided as in `state()`; within `on_gradients` alone."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The logical tensors of a checkpoint: `model.*`, optimizer states by parameter name, random states.

        They have the same names and (global) shapes in every layout; what ranks divide is a DTensor. With adapters the
        frozen weights are left out.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from tensors that `state()` gave, after a checkpoint filled them."""

    @abstractmethod
    def close(self, part: bool = True) -> None:
        """Let go of everything and, unless another engine of this process goes on, `part` from the other ranks."""


def check_batch_size(train: TrainConfig, topology: Topology) -> None:
    """Raise UsageError when the processes cannot share the global batch evenly."""
    if train.global_batch_size % topology.world_size:
        raise UsageError(
            f"train.global_batch_size={train.global_batch_size} is not divisible by the {topology.world_size} "
            "processes of this run; choose a multiple",
            common=True,
        )


def build_loss(
    model: LanguageModel,
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    pad_id: int,
    preference: PreferenceConfig | None,
) -> TrainingLoss:
    """The module that an engine wraps: the model with its loss, compiled when the config says so."""
    model.model.activation_checkpointing = train.activation_checkpointing
    torch.manual_seed(train.seed)  # whatever this process drew before is no part of the run
    loss = TrainingLoss(model, train.balance, pad_id, dtype, preference)
    loss.all_reduce = all_reduce_sum
    if train.compile:
        if needed := compiling_needs(device):
            raise UsageError(f"train.compile=true needs {needed}; install it, or set train.compile=false")
        # Block by block: layers of one kind share one compiled graph, and names stay as they are.
        for block in model.model.layers:
            block.compile()
        loss.nll = torch.compile(next_token_nll)
    return loss
