"""The engine: one interface for turning micro-batches into an optimizer step, whatever runs underneath."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.model.transformer import LanguageModel
from moe_lm.objective.quantile_balance import set_biases
from moe_lm.objective.training_loss import LossParts, StepCounts, TrainingLoss
from moe_lm.optim.groups import bias_ranges, schedule_factor, update_router_biases
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.logical import Piece, assign, flat, piece_of
from moe_lm.parallel.topology import Topology

# The load of the step before, which the batch loss uses, in a checkpoint. Those of older versions have none: 0, as at
# the start.
LOAD = "load"


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
    """A step's loss parts, added up over the whole global batch, on the host."""

    sums: dict[str, float]  # "loss" and the further figures of the objective
    balance: float
    load: Tensor  # [layers, E] int64
    entropy: Tensor  # [layers]


class ForwardShare(NamedTuple):
    """One of several batches that the ranks share, and its loss parts on this rank."""

    number: int  # of the batch among all
    batch: Batch
    parts: LossParts
    units: int  # of the objective, in this rank's positions of its own batch
    is_own: bool  # False: another rank's batch, repeated because every rank takes part in a forward pass


class Evaluation(NamedTuple):
    """The objective's loss and further figures, each summed over the units that were evaluated."""

    sums: dict[str, float]
    units: int


class Engine(ABC):
    """Hides accumulation, precision, clipping, the optimizer and the schedule from the training loop.

    Every rank is a data-parallel rank with rows of its own, or with its part of its group's rows, whatever else its
    layout divides.
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
        self._load: Tensor | None = None  # [layers, E] int64, of the step before
        self._needed: Tensor | None = None  # [layers, E, bins] int32, of this step and rank, for quantile balancing
        if train.balance.batch_loss and self.model.moe_layers:
            experts = self.model.config.n_routed_experts
            self._load = torch.zeros(len(self.model.moe_layers), experts, dtype=torch.int64, device=device)

    def train_step(
        self,
        step: int,
        micro_batches: Sequence[Batch],
        on_gradients: Callable[[], None] | None = None,
        loss_limit: float = math.inf,
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches, of whole rows, of global step `step` (counted from 0).

        `on_gradients` is called after the last backward pass, before clipping. A step whose loss is above `loss_limit`,
        or whose loss or gradient is not finite, is skipped.
        """
        self.loss.train()
        if self._before_step is not None:
            self._before_step(step)
        micro_batches = [self._own(batch) for batch in micro_batches]
        counts = self._count(micro_batches)
        micro_batches = [self._to_device(batch) for batch in micro_batches]
        parts = self._accumulate(micro_batches, counts)
        if on_gradients is not None:
            on_gradients()
        totals = self._add_up(parts)
        factor = schedule_factor(step, self.config.steps, self.config.schedule)
        # Loss and gradient were summed over the ranks: what one rank sees in them, all see, and skip alike.
        loss = totals.sums["loss"] / counts.units
        update = self._clip_and_update(factor, accepted=math.isfinite(loss) and loss <= loss_limit)
        if not update.skipped:
            self._note_load(totals.load)
        return self._result(loss, counts, totals, update, self.config.optimizer.lr * factor)

    def _count(self, micro_batches: Sequence[Batch]) -> StepCounts:
        """Sizes of the whole global batch."""
        counts = self.loss.count(micro_batches)
        totals = self._sums_on_host({name: torch.tensor(count) for name, count in counts.items()})
        return StepCounts(
            units=max(1, int(totals["units"])),
            targets=max(1, int(totals["targets"])),
            tokens=max(1, int(totals["tokens"])),
            rows=int(totals["rows"]) // self.topology.sequence_parallel_size,
            load=self._load,
        )

    def _own(self, batch: Batch) -> Batch:
        """This rank's positions, where ranks share the rows."""
        ranks = self.topology.sequence_parallel_size
        return batch if ranks == 1 else batch.part(self.topology.rank % ranks, ranks)

    def _to_device(self, batch: Batch) -> Batch:
        if batch.input_ids.device != self.device:
            batch = batch.to(self.device)
        if self.config.compile:
            # Only the number of documents differs from batch to batch.
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return batch

    def _accumulate(self, micro_batches: Sequence[Batch], counts: StepCounts) -> list[LossParts]:
        """Run forward and backward on every micro-batch; their gradients add up, at the end over the ranks too."""
        parts: list[LossParts] = []
        self._needed = None
        for number, batch in enumerate(micro_batches, 1):
            part = self._forward_backward(batch, counts, last=number == len(micro_batches))
            # Counts in so many bins are too large to keep those of every micro-batch.
            self._needed = part.needed if self._needed is None else self._needed.add_(part.needed)
            parts.append(part._replace(loss=part.loss.detach(), needed=self._needed))
        return parts

    def _add_up(self, parts: Sequence[LossParts]) -> Totals:
        """Add up over micro-batches and ranks: one exchange, and one copy to the host."""
        rows = [{"balance": part.balance, **part.sums} for part in parts]
        totals = torch.stack([torch.stack(list(row.values())) for row in rows]).sum(0)
        entropy = torch.stack([part.entropy for part in parts]).mean(0)
        load = torch.stack([part.load for part in parts]).sum(0)
        found = self._sums_on_host({"load": load, "entropy": entropy, "totals": totals})
        sums = dict(zip(rows[0], found["totals"].tolist(), strict=True))
        return Totals(
            balance=sums.pop("balance"),
            entropy=found["entropy"] / self.topology.world_size,
            load=found["load"],
            sums=sums,
        )

    def _note_load(self, load: Tensor) -> None:
        """Let the next step know the load of this one."""
        if self._load is not None:
            self._load.copy_(load)
        if self.config.balance.bias_update == "quantile" and self._needed is not None:
            needed = self._needed if self.exchange is None else self.exchange.sum(self._needed)
            set_biases(self.model, needed, self.config.balance.quantile_memory)
        elif self.config.balance.bias_update_rate:
            update_router_biases(self.model, load, self.config.balance.bias_update_rate)

    def _result(
        self, loss: float, counts: StepCounts, totals: Totals, update: Update, learning_rate: float
    ) -> StepResult:
        return StepResult(
            loss=loss,
            balance_loss=totals.balance,
            grad_norm=update.grad_norm,
            learning_rate=learning_rate,
            targets=counts.targets,
            tokens=counts.tokens,
            skipped=update.skipped,
            load=totals.load,
            entropy=totals.entropy,
            bias_range=bias_ranges(self.model),
            figures={name: total / counts.units for name, total in totals.sums.items() if name != "loss"},
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Evaluation:
        """Sum loss and figures over all batches, which the ranks share."""
        units, names, rows = 0, list[str](), list[Tensor]()
        for share in self.forward_shares(batches):
            names, row = list(share.parts.sums), torch.stack(list(share.parts.sums.values()))
            rows.append(row if share.is_own else torch.zeros_like(row))  # another rank's batch still tells the names
            units += share.units
        if not rows:
            return Evaluation({}, 0)
        mine = {"units": torch.tensor(units), "sums": torch.stack(rows).cpu().double().sum(0)}
        totals = self._sums_on_host(mine)
        return Evaluation(dict(zip(names, totals["sums"].tolist(), strict=True)), int(totals["units"]))

    @torch.no_grad()
    def forward_shares(self, batches: Sequence[Batch]) -> Iterator[ForwardShare]:
        """Evaluate this rank's share of the batches.

        It asks for no other batch. But tokens travel between ranks, so one that has no batch left repeats another's.
        """
        self.loss.eval()
        for start in range(0, len(batches), self.topology.row_groups):
            mine = start + self.topology.row_group
            is_own = mine < len(batches)
            number = mine if is_own else start
            batch = self._own(batches[number])
            units = self.loss.objective.units(batch) if is_own else 0
            batch = self._to_device(batch)
            yield ForwardShare(number, batch, self._forward(batch, None), units, is_own)

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank raised its flag."""
        return flag if self.exchange is None else bool(self.exchange.sum(torch.tensor(int(flag), device=self.device)))

    def _sums_on_host(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Small tensors of any data types, summed over the ranks: one exchange, one copy to the host.

        They travel in float64, which holds float32, and counts up to 2^53, exactly.
        """
        # A Mac's GPU has no float64; there is no exchange there either.
        on_device = [t.cpu() if self.device.type == "mps" else t.to(self.device) for t in named.values()]
        packed = torch.cat([tensor.flatten().double() for tensor in on_device])
        packed = (packed if self.exchange is None else self.exchange.sum(packed)).cpu()
        parts = packed.split([tensor.numel() for tensor in named.values()])
        return {
            name: part.view(like.shape).to(like.dtype) for (name, like), part in zip(named.items(), parts, strict=True)
        }

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
    def gradients(self) -> dict[str, Tensor | Piece]:
        """The gradient of every trained parameter, named and divided as in `state()`, while `on_gradients` runs."""

    @abstractmethod
    def state(self) -> dict[str, Tensor | Piece]:
        """The logical tensors of a checkpoint: `model.*`, optimizer states by parameter name, random states.

        They have the same names and whole shapes in every layout. Of those that the ranks divide, this rank has pieces.
        All are in the memory that trains: nothing is copied, and nothing travels. Frozen weights are left out if there
        are adapters.
        """

    @abstractmethod
    def load_state(self, state: Mapping[str, Tensor | Piece]) -> None:
        """Continue from the tensors of `state()`, on any rank its own, after a checkpoint has filled them."""

    def _common_state(self) -> dict[str, Tensor | Piece]:
        """The tensors of `state()` that do not depend on the engine."""
        state: dict[str, Tensor | Piece] = {"random.cpu": torch.get_rng_state()}
        if self._load is not None:
            state[LOAD] = self._load.cpu()
        return state

    def _load_common_state(self, state: Mapping[str, Tensor | Piece]) -> None:
        common = self._common_state()
        assign(common, state)
        torch.set_rng_state(flat(piece_of(common["random.cpu"])))
        if self._load is not None:
            assign({LOAD: self._load}, common)

    @abstractmethod
    def close(self, leave: bool = True) -> None:
        """Release everything, and `leave` the process group unless another engine of this process needs it."""
