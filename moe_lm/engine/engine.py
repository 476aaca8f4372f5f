"""The engine: one interface for turning micro-batches into an optimizer step, whatever runs underneath."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.training_loss import LossParts, StepCounts, TrainingLoss
from moe_lm.optim.groups import schedule_factor, update_router_biases
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.topology import Topology


@dataclass(frozen=True)
class StepResult:
    """A finished optimizer step, over the whole global batch."""

    loss: float  # mean over the units: nats per target token, or the loss of a pair
    balance_loss: float
    grad_norm: float  # before clipping; infinite when DeepSpeed did not take the step
    learning_rate: float
    targets: int  # tokens that were predicted
    tokens: int  # tokens that went through the model, without padding
    skipped: bool  # the loss or the gradient was not finite, or the loss above its limit: nothing was changed
    load: Tensor  # [layers, E] int64 on the CPU, tokens per expert
    entropy: Tensor  # [layers], the router's, nats
    bias_range: list[float]  # largest minus smallest router bias of each layer
    figures: dict[str, float]  # further figures of the objective, means over the units


class Update(NamedTuple):
    """The outcome of an optimizer update."""

    grad_norm: float  # global, over every parameter of the model, before clipping
    skipped: bool


class Totals(NamedTuple):
    """A step's loss parts, added up over the whole global batch."""

    sums: dict[str, Tensor]  # "loss" and the further figures of the objective
    balance: Tensor
    load: Tensor
    entropy: Tensor


class ForwardShare(NamedTuple):
    """One of several batches that the ranks share, and its loss parts on this rank."""

    number: int  # of the batch among all
    batch: Batch
    parts: LossParts
    is_own: bool  # False: another rank's batch, repeated because every rank takes part in a forward pass


class Evaluation(NamedTuple):
    """The objective's loss and further figures, each summed over the units that were evaluated."""

    sums: dict[str, float]
    units: int


class Engine(ABC):
    """Hides accumulation, precision, clipping, the optimizer and the schedule from the training loop.

    Every rank is a data-parallel rank with rows of its own, whatever else its layout divides.
    """

    wrapped: Any  # `loss`, or what DDP or DeepSpeed puts around it

    def __init__(
        self,
        loss: TrainingLoss,
        train: TrainConfig,
        topology: Topology,
        device: torch.device,
        exchange: Exchange | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        self.loss = loss
        self.model: LanguageModel = loss.model
        self.config = train
        self.topology = topology
        self.device = device
        self.dtype = loss.dtype
        self.exchange = exchange  # None in a single process
        self._before_step = before_step

    def train_step(
        self,
        step: int,
        micro_batches: Sequence[Batch],
        on_gradients: Callable[[], None] | None = None,
        loss_limit: float = math.inf,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches of global step `step` (counted from 0).

        `on_gradients` is called after the last backward pass, before clipping. A step whose loss is above `loss_limit`,
        or whose loss or gradient is not finite, is skipped.
        """
        self.loss.train()
        if self._before_step is not None:
            self._before_step(step)
        counts = self._count(micro_batches)
        micro_batches = [self._to_device(batch) for batch in micro_batches]
        if self.loss.needs_load_ahead(len(micro_batches)):
            counts = replace(counts, load=self._count_load_ahead(micro_batches))
        parts = self._accumulate(micro_batches, counts)
        if on_gradients is not None:
            on_gradients()
        totals = self._add_up(parts)
        factor = schedule_factor(step, self.config.steps, self.config.schedule)
        # Loss and gradient were summed over the ranks: what one rank sees in them, all see, and skip alike.
        loss = float(totals.sums["loss"]) / counts.units
        update = self._clip_and_update(factor, accepted=math.isfinite(loss) and loss <= loss_limit)
        if not update.skipped and self.config.balance.bias_update_rate:
            update_router_biases(self.model, totals.load, self.config.balance.bias_update_rate)
        return self._result(loss, counts, totals, update, self.config.optimizer.lr * factor)

    def _count(self, micro_batches: Sequence[Batch]) -> StepCounts:
        """Sizes of the whole global batch."""
        counts = self.loss.count(micro_batches)
        totals = self._sum_over_ranks({name: torch.tensor(count) for name, count in counts.items()})
        return StepCounts(
            units=max(1, int(totals["units"])),
            targets=max(1, int(totals["targets"])),
            tokens=max(1, int(totals["tokens"])),
            rows=int(totals["rows"]),
        )

    def _to_device(self, batch: Batch) -> Batch:
        if batch.input_ids.device != self.device:
            batch = batch.to(self.device)
        if self.config.compile:
            # Only the number of documents differs from batch to batch.
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return batch

    @torch.no_grad()
    def _count_load_ahead(self, micro_batches: Sequence[Batch]) -> Tensor:
        """Count the load of the whole global batch in a forward pass ahead of the one that has a gradient."""
        load = torch.stack([self._forward(batch, None).load for batch in micro_batches]).sum(0)
        return self._sum_over_ranks({"load": load})["load"]

    def _accumulate(self, micro_batches: Sequence[Batch], counts: StepCounts) -> list[LossParts]:
        """Run forward and backward on every micro-batch; their gradients add up, at the end over the ranks too."""
        parts = []
        for number, batch in enumerate(micro_batches, 1):
            part = self._forward_backward(batch, counts, last=number == len(micro_batches))
            parts.append(part._replace(loss=part.loss.detach()))
        return parts

    def _add_up(self, parts: Sequence[LossParts]) -> Totals:
        """Add up over micro-batches and ranks; the scalars and the entropy share one exchange."""
        rows = [{"balance": part.balance, **part.sums} for part in parts]
        totals = torch.stack([torch.stack(list(row.values())) for row in rows]).sum(0)
        entropy = torch.stack([part.entropy for part in parts]).mean(0)
        sums = self._sum_over_ranks({**dict(zip(rows[0], totals, strict=True)), "entropy": entropy})
        load = self._sum_over_ranks({"load": torch.stack([part.load for part in parts]).sum(0)})
        return Totals(
            balance=sums.pop("balance"),
            entropy=sums.pop("entropy") / self.topology.world_size,
            load=load["load"],
            sums=sums,
        )

    def _result(
        self, loss: float, counts: StepCounts, totals: Totals, update: Update, learning_rate: float
    ) -> StepResult:
        biases = [layer.gate.e_score_correction_bias for layer in self.model.moe_layers]
        return StepResult(
            loss=loss,
            balance_loss=float(totals.balance),
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            targets=counts.targets,
            tokens=counts.tokens,
            skipped=update.skipped,
            load=totals.load.cpu(),
            entropy=totals.entropy.float().cpu(),
            bias_range=[float(bias.max() - bias.min()) for bias in biases],
            figures={name: float(total / counts.units) for name, total in totals.sums.items() if name != "loss"},
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Sum loss and figures over all batches, which the ranks share."""
        mine = {"units": 0.0}
        for share in self.forward_shares(batches):
            found: dict[str, float | Tensor] = {"units": self.loss.objective.units(share.batch), **share.parts.sums}
            for name, value in found.items():  # another rank's batch still tells this rank the names
                mine[name] = mine.get(name, 0.0) + (float(value) if share.is_own else 0.0)
        named = {name: torch.tensor(total, dtype=torch.float64) for name, total in mine.items()}
        sums = {name: float(total) for name, total in self._sum_over_ranks(named).items()}
        return Evaluation(units=int(sums.pop("units")), sums=sums)

    @torch.no_grad()
    def forward_shares(self, batches: Sequence[Batch]) -> Iterator[ForwardShare]:
        """Evaluate this rank's share of the batches.

        Tokens travel between ranks, so a rank that has no batch left repeats another rank's.
        """
        self.loss.eval()
        for start in range(0, len(batches), self.topology.world_size):
            mine = start + self.topology.rank
            is_own = mine < len(batches)
            number = mine if is_own else start
            batch = self._to_device(batches[number])
            yield ForwardShare(number, batch, self._forward(batch, None), is_own)

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank raised its flag."""
        return flag if self.exchange is None else bool(self.exchange.sum(torch.tensor(int(flag), device=self.device)))

    def _sum_over_ranks(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        return named if self.exchange is None else self.exchange.sums(named)

    def _forward(self, batch: Batch, counts: StepCounts | None) -> LossParts:
        parts: LossParts = self.wrapped(batch, counts)
        return parts

    @abstractmethod
    def _forward_backward(self, batch: Batch, counts: StepCounts, last: bool) -> LossParts:
        """Run forward and backward; with `last`, sum the gradients over the ranks."""

    @abstractmethod
    def _clip_and_update(self, factor: float, accepted: bool) -> Update:
        """Clip the gradients, step at `factor` of the peak rates, drop the gradients.

        There is no step if the loss is not `accepted` or the gradient norm is not finite.
        """

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that are not frozen, by name."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter, named and divided as in `state()`, while `on_gradients` runs."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The logical tensors of a checkpoint: `model.*`, optimizer states by parameter name, random states.

        They have the same names and (global) shapes in every layout; those that the ranks divide are DTensors. Frozen
        weights are left out if there are adapters.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of `state()` after a checkpoint has filled them."""

    @abstractmethod
    def close(self, leave: bool = True) -> None:
        """Release everything, and `leave` the process group unless another engine of this process needs it."""
