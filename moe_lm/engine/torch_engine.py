"""The engine without DeepSpeed: one device, or plain data parallelism, on Accelerate."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from moe_lm.config.training import TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.engine.engine import Engine, Update
from moe_lm.engine.frozen import left_to_base, narrow_frozen
from moe_lm.kernels.rounding import RoundedWeights
from moe_lm.model.moe import all_logical, logical
from moe_lm.objective.training_loss import LossParts, StepCounts, TrainingLoss
from moe_lm.optim.groups import build_optimizers, set_learning_rate
from moe_lm.optim.matrices import whole
from moe_lm.parallel.exchange import Exchange
from moe_lm.parallel.logical import Piece, assign
from moe_lm.parallel.process_group import Ranks
from moe_lm.parallel.process_group import leave as leave_group
from moe_lm.parallel.topology import Topology


class TorchEngine(Engine):
    """Float32 weights and optimizer states; where the device is fast at bfloat16, products of rounded copies."""

    def __init__(
        self,
        loss: TrainingLoss,
        train: TrainConfig,
        topology: Topology,
        device: torch.device,
        exchange: Exchange | None = None,
        before_step: Callable[[int], None] | None = None,
    ) -> None:
        AcceleratorState._reset_state()  # a process-wide singleton there; a process may hold two engines
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # the loss runs under autocast by itself
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
        super().__init__(loss, train, topology, self.accelerator.device, exchange, before_step)
        narrow_frozen(self.model, self.dtype)
        loss.to(self.device)
        self.rounded = None if self.dtype == torch.float32 else RoundedWeights(self.model, self.dtype)
        share_of = whole if topology.world_size == 1 else partial(whole, ranks=Ranks())
        self.optimizers = build_optimizers(self.model, train.optimizer, self.dtype, share_of)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its successor does less
            self.wrapped = self.accelerator.prepare(loss)

    def _forward_backward(self, batch: Batch, counts: StepCounts, last: bool) -> LossParts:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            part = self._forward(batch, counts)
            # DDP averages gradients over the ranks, but the parts already add up to the global loss.
            (part.loss * self.topology.world_size).backward()
        return part

    def _clip_and_update(self, factor: float, accepted: bool) -> Update:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.config.clip_norm or float("inf")))
        skipped = not (math.isfinite(grad_norm) and accepted)
        if not skipped:
            set_learning_rate(self.optimizers, factor)
            for optimizer in self.optimizers:
                optimizer.step()
            self._weights_changed()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return Update(grad_norm, skipped)

    def gradients(self) -> dict[str, Tensor | Piece]:
        named = ((name, torch.zeros_like(p) if p.grad is None else p.grad) for name, p in self.trained())
        return {name: gradient.clone() for name, gradient in all_logical(named).items()}

    def state(self) -> dict[str, Tensor | Piece]:
        elsewhere = left_to_base(self.model)
        state: dict[str, Tensor | Piece] = {
            f"model.{name}": t for name, t in self.model.state_dict().items() if name not in elsewhere
        }
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, tensors in optimizer.state.items():
                for key, tensor in tensors.items():
                    state |= {f"{key}.{name}": view for name, view in logical(names[parameter], tensor).items()}
        return state | self._common_state()

    def load_state(self, state: Mapping[str, Tensor | Piece]) -> None:
        assign(self.state(), state)
        self._weights_changed()
        self._load_common_state(state)

    def _weights_changed(self) -> None:
        if self.rounded is not None:
            self.rounded.refresh()

    def close(self, leave: bool = True) -> None:
        # A process group whose last owner is DDP hangs when it is freed (pytorch/pytorch#190489), so DDP goes first.
        self.wrapped = self.loss
        self.accelerator.free_memory()
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=leave)
        if leave:
            leave_group()
