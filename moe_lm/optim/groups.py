"""Optimizers by parameter group, learning-rate schedules, the router-bias update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moe_lm.config.training import OptimizerConfig, ScheduleConfig
from moe_lm.model.moe import logical_names
from moe_lm.model.transformer import LanguageModel
from moe_lm.optim.average import keep_average
from moe_lm.optim.lamb import Lamb
from moe_lm.optim.matrices import ShareOf, whole
from moe_lm.optim.muon import Muon

Rule = Literal["adamw", "muon", "lamb"]


def build_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    dtype: torch.dtype = torch.float32,
    share_of: ShareOf = whole,
) -> list[torch.optim.Optimizer]:
    """AdamW or LAMB for everything, or Muon for the hidden matrices and AdamW for embeddings, head, router, vectors.

    Muon orthogonalises in `dtype`, all else is computed in the type of the weights, float32.
    Frozen parameters are left out. Weight decay is decoupled and acts only on matrices. Every state tensor exists from
    the start, so that a checkpoint can be loaded into an optimizer that has not stepped yet.
    """
    trained = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    by_rule: dict[Rule, list[dict[str, Any]]] = {}
    for group in parameter_groups(trained, config):
        by_rule.setdefault(group["rule"], []).append(group)
    return [build_optimizer(rule, groups, config, dtype, share_of) for rule, groups in by_rule.items()]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> list[dict[str, Any]]:
    """What is stepped alike: the `rule`, the weight decay, and how many `matrices` a parameter has side by side.

    AdamW looks at single numbers, so its parameters need not be told apart by their matrices.
    """
    groups: dict[tuple[Rule, float, int], list[nn.Parameter]] = {}
    for name, parameter in named:
        rule: Rule = config.name
        if rule == "muon" and not is_hidden_matrix(name, parameter):
            rule = "adamw"
        decay = config.weight_decay if parameter.ndim >= 2 else 0.0
        matrices = 1 if rule == "adamw" else len(logical_names(name))
        groups.setdefault((rule, decay, matrices), []).append(parameter)
    return [
        {"params": parameters, "rule": rule, "weight_decay": decay, "matrices": matrices}
        for (rule, decay, matrices), parameters in sorted(groups.items(), key=lambda item: _order(*item[0]))
    ]


def _order(rule: Rule, decay: float, matrices: int) -> tuple[bool, bool, int]:
    return rule == "muon", decay == 0, matrices


def build_optimizer(
    rule: Rule,
    groups: list[dict[str, Any]],
    config: OptimizerConfig,
    dtype: torch.dtype = torch.float32,
    share_of: ShareOf = whole,
    device: torch.device | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of these groups; see `Muon` for what it computes where."""
    optimizer: torch.optim.Optimizer
    if rule == "muon":
        rates = config.muon_lr, config.muon_momentum, config.weight_decay
        optimizer = Muon(groups, *rates, dtype, share_of, device)
    elif rule == "lamb":
        optimizer = Lamb(groups, config.lr, config.betas, config.eps, share_of, device)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    if config.ema_decay is not None:
        keep_average(optimizer, config.ema_decay)
    return optimizer


def step_on_threads(optimizer: torch.optim.Optimizer, threads: int) -> None:
    """Let an optimizer of weights in host memory use this many threads.

    A launcher gives each rank one thread (torchrun sets OMP_NUM_THREADS=1), which is right for all else that a rank
    with a GPU does there.
    """
    before = torch.get_num_threads()
    optimizer.register_step_pre_hook(lambda *_: torch.set_num_threads(threads))
    optimizer.register_step_post_hook(lambda *_: torch.set_num_threads(before))


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon takes this parameter: a matrix or a stack of experts inside a block, but neither router nor gate."""
    return ".layers." in name and parameter.ndim >= 2 and not name.endswith("gate.weight")


def moments(name: str, parameter: Tensor, config: OptimizerConfig) -> int:
    """Numbers that an optimizer keeps of a parameter between steps: Muon one moment, AdamW and LAMB two; an average."""
    kept = 1 if config.name == "muon" and is_hidden_matrix(name, parameter) else 2
    return parameter.numel() * (kept + (config.ema_decay is not None))


def schedule_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """The learning rate of step `step` (counted from 0) as a fraction of its peak."""
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


def first_other_rate(done: int, total_steps: int, other_total: int, config: ScheduleConfig) -> int | None:
    """The first of `done` steps (counted from 0) whose rate differs in a run of `other_total` steps."""
    return next(
        (
            step
            for step in range(done)
            if schedule_factor(step, total_steps, config) != schedule_factor(step, other_total, config)
        ),
        None,
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def update_router_biases(model: LanguageModel, load: Tensor, rate: float) -> None:
    """Move every expert's bias by `rate` towards an even load (DeepSeek-V3, section 2.1.2).

    `load [layers, E]` holds the counts of the whole global batch. They are compared with their mean in integers, so
    that no device rounds its way to another sign.
    """
    moves = rate * torch.sign(load.sum(1, keepdim=True) - load * load.shape[1])
    for layer, move in zip(model.moe_layers, moves.to(model.device), strict=True):
        layer.gate.e_score_correction_bias += move


def bias_ranges(model: LanguageModel) -> list[float]:
    """The largest minus the smallest router bias of every MoE layer."""
    biases = [layer.gate.e_score_correction_bias for layer in model.moe_layers]
    if not biases:
        return []
    low_L, high_L = torch.stack(biases).aminmax(dim=1)
    ranges: list[float] = (high_L - low_L).tolist()
    return ranges
