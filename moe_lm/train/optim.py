"""Optimizers by parameter group, learning-rate schedules, the router-bias update."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from moe_lm.config import OptimizerConfig, ScheduleConfig
from moe_lm.model.device import pick_dtype
from moe_lm.model.transformer import LanguageModel


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for embeddings, head, router, norms, biases.

    Weight decay is decoupled and acts on matrices only. Every state tensor exists from the start, so that a
    checkpoint can be loaded into an optimizer that has not stepped yet.
    """
    muon: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (muon if config.name == "muon" and is_hidden_matrix(name, parameter) else others).append(parameter)
    adamw = build_adamw(adamw_groups(others, config), config)
    for parameter in others:
        adamw.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon:
        optimizers.append(Muon(muon, config.muon_lr, config.muon_momentum, config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def adamw_groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors without; a group without parameters is left out."""
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: a matrix or a stack of experts inside a block, and not its router."""
    return ".layers." in name and parameter.ndim >= 2 and ".gate.weight" not in name


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (Keller Jordan, 2024), for 2-D and stacked 3-D weights.

    `torch.optim.Muon` takes 2-D weights only and one at a time. Here every matrix of the same shape, of whatever
    layer or expert, is orthogonalised in one batched product. The update is scaled by `sqrt(max(1, rows / columns))`
    of the matrix seen as output x input, so that one rate suits every shape.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[tuple(parameter.shape[-2:])].append(parameter)
            for parameters in by_shape.values():
                self._step_same_shape(parameters, group)

    def _step_same_shape(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        momentum, rate = group["momentum"], group["lr"]
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            buffer = self.state[parameter]["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - momentum)
            update = torch.lerp(parameter.grad, buffer, momentum)  # Nesterov
            updates.append(update.view(-1, *parameter.shape[-2:]))
        orthogonal = orthogonalise(torch.cat(updates))
        pieces = orthogonal.split([len(update) for update in updates])
        for parameter, piece in zip(parameters, pieces, strict=True):
            out_size, in_size = parameter.shape if parameter.ndim == 2 else parameter.shape[:0:-1]
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(piece.view_as(parameter), alpha=-rate * math.sqrt(max(1.0, out_size / in_size)))


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each in `[N, rows, columns]`, roughly: Newton-Schulz, in bfloat16
    where the device is fast at it; a CPU without instructions for it is 20 times slower at it than at float32.

    The quintic's coefficients are Muon's; singular values end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(pick_dtype("auto", matrices.device))
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrices.dtype)


def schedule_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of step `step` (counted from 0) over its peak."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.name == "cosine":
        done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
        return config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if config.name == "wsd":
        decay_steps = config.decay_fraction * total_steps
        left = max(0.0, min(1.0, (total_steps - step) / decay_steps))
        return config.min_ratio + (1 - config.min_ratio) * left
    if config.name == "multistep":
        passed = sum(step >= milestone * total_steps for milestone in config.milestones)
        return config.factor**passed
    return 1.0


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def update_router_biases(model: LanguageModel, load: Tensor, rate: float) -> None:
    """Move every expert's bias by `rate` towards an even load (DeepSeek-V3, section 2.1.2).

    `load [layers, E]` are the integer counts of the whole global batch; compared with their mean in integers, so that
    no device rounds its way to another sign.
    """
    for layer, counts in zip(model.moe_layers, load, strict=True):
        layer.gate.e_score_correction_bias += rate * torch.sign(counts.sum() - counts * len(counts))
