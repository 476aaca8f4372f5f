"""The engine without DeepSpeed: one device, or plain data parallelism, on Accelerate."""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from moe_lm.config import ParallelConfig, TrainConfig
from moe_lm.data.batches import Batch
from moe_lm.errors import UsageError
from moe_lm.model.device import compiling_needs, pick_device, pick_dtype
from moe_lm.model.transformer import LanguageModel
from moe_lm.parallel.engine import StepResult
from moe_lm.parallel.topology import all_reduce_sum, any_rank, current_topology, leave
from moe_lm.train.losses import LossParts, StepCounts, TrainingLoss, next_token_nll
from moe_lm.train.optim import build_optimizers, schedule_factor, set_learning_rate, update_router_biases


class TorchEngine:
    """Float32 weights and optimizer states; products in bfloat16 under autocast where the device is fast at it."""

    def __init__(self, model: LanguageModel, train: TrainConfig, parallel: ParallelConfig, pad_id: int) -> None:
        self.topology = current_topology()
        if train.global_batch_size % self.topology.world_size:
            raise UsageError(
                f"train.global_batch_size={train.global_batch_size} is not divisible by the {self.topology.world_size} "
                "processes of this run; choose a multiple"
            )
        device = pick_device(parallel.device)
        self.dtype = pick_dtype(train.precision, device)
        self.config = train
        self.model = model
        model.model.activation_checkpointing = train.activation_checkpointing
        if train.compile:
            if needed := compiling_needs(device):
                raise UsageError(f"train.compile=true needs {needed}; install it, or set train.compile=false")
            # Block by block: layers of one kind share one compiled graph, and names stay as they are.
            for block in model.model.layers:
                block.compile()
        AcceleratorState._reset_state()  # precision is a process-wide singleton there; a process may hold two engines
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="bf16" if self.dtype == torch.bfloat16 else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.device = self.accelerator.device
        torch.manual_seed(train.seed)  # whatever this process drew before is no part of the run
        self.loss: TrainingLoss = TrainingLoss(model, train.balance, pad_id).to(self.device)
        self.loss.all_reduce = all_reduce_sum
        if train.compile:
            self.loss.nll = torch.compile(next_token_nll)
        self.optimizers = build_optimizers(model, train.optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # its heir knows less
            self.wrapped: nn.Module = self.accelerator.prepare(self.loss)

    def train_step(self, step: int, micro_batches: Sequence[Batch]) -> StepResult:
        micro_batches = [self._place(batch) for batch in micro_batches]
        counts = self._step_counts(micro_batches)
        self.wrapped.train()
        parts = []
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                part: LossParts = self.wrapped(batch, counts)
                # DDP averages gradients over the ranks, but the parts already add up to the global loss.
                (part.loss * self.topology.world_size).backward()
            parts.append(part._replace(loss=part.loss.detach()))
        return self._finish_step(step, counts, parts)

    def _finish_step(self, step: int, counts: StepCounts, parts: list[LossParts]) -> StepResult:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        max_norm = self.config.clip_norm or float("inf")
        grad_norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
        sums = all_reduce_sum(torch.stack([torch.stack((part.nll_sum, part.balance)) for part in parts]).sum(0))
        load = all_reduce_sum(torch.stack([part.load for part in parts]).sum(0))
        entropy = all_reduce_sum(torch.stack([part.entropy for part in parts]).mean(0)) / self.topology.world_size
        # Loss and gradient were summed over the ranks: when one is not finite, every rank sees it and skips alike.
        skipped = not (math.isfinite(grad_norm) and math.isfinite(sums[0]))
        factor = schedule_factor(step, self.config.steps, self.config.schedule)
        if not skipped:
            set_learning_rate(self.optimizers, factor)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.config.balance.bias_update_rate:
                update_router_biases(self.model, load, self.config.balance.bias_update_rate)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        biases = [layer.gate.e_score_correction_bias for layer in self.model.moe_layers]
        return StepResult(
            loss=float(sums[0]) / counts.targets,
            balance_loss=float(sums[1]),
            grad_norm=grad_norm,
            learning_rate=self.config.optimizer.lr * factor,
            targets=counts.targets,
            tokens=counts.tokens,
            skipped=skipped,
            load=load.cpu(),
            entropy=entropy.float().cpu(),
            bias_range=[float(bias.max() - bias.min()) for bias in biases],
        )

    @torch.no_grad()
    def _step_counts(self, micro_batches: Sequence[Batch]) -> StepCounts:
        targets = sum(batch.num_targets for batch in micro_batches)
        tokens = sum(int((batch.input_ids != self.loss.pad_id).sum()) for batch in micro_batches)
        rows = sum(len(batch.input_ids) for batch in micro_batches)
        total = all_reduce_sum(torch.tensor([targets, tokens, rows], device=self.device)).tolist()
        counts = StepCounts(targets=max(1, total[0]), tokens=max(1, total[1]), rows=total[2])
        if self.config.balance.batch_loss and len(micro_batches) > 1:
            # The batch loss needs the load of the whole global batch before the first gradient: one pass ahead.
            with self.accelerator.autocast():
                loads = [self.loss.load(batch, self.loss.run_model(batch)) for batch in micro_batches]
            return replace(counts, load=all_reduce_sum(torch.stack(loads).sum(0)))
        return counts

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        self.loss.eval()
        nll, targets = 0.0, 0
        for batch in batches[self.topology.rank :: self.topology.world_size]:
            batch = self._place(batch)
            with self.accelerator.autocast():
                logits = self.loss.run_model(batch).logits
            nll += float(next_token_nll(logits, batch.targets))
            targets += batch.num_targets
        if self.topology.world_size > 1:
            sums = torch.tensor([nll, targets], dtype=torch.float64, device=self.device)
            nll, targets = all_reduce_sum(sums).tolist()
        return nll, int(targets)

    def _place(self, batch: Batch) -> Batch:
        batch = batch.to(self.device)
        if self.config.compile:
            # The number of documents differs from batch to batch; nothing else does.
            torch._dynamo.mark_dynamic(batch.cu_seqlens, 0)
        return batch

    def state(self) -> dict[str, Tensor]:
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, tensors in optimizer.state.items():
                state |= {f"{key}.{names[parameter]}": tensor for key, tensor in tensors.items()}
        state["random.cpu"] = torch.get_rng_state()
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        torch.set_rng_state(state["random.cpu"])

    def any_rank(self, flag: bool) -> bool:
        return any_rank(flag, self.device)

    def close(self) -> None:
        # A process group whose last owner is DDP hangs when it is freed (pytorch/pytorch#190489), so DDP goes first.
        self.wrapped = self.loss
        self.accelerator.free_memory()
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=True)
        leave()
