"""LAMB for large batches (You et al. 2020, arXiv 1904.00962): Adam's direction with a length set per matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of the paper, with bias correction and phi the identity.

    A group's `matrices` says how many lie side by side in each of its parameters; each has its own ratio.

    A matrix moves by `lr` times its own norm, whatever the norm of its gradient: `x -= lr * |x| / |u| * u` with
    `u = m / (sqrt(v) + eps) + weight_decay * x`. Each expert of a stack [E, in, out] is a matrix with its own ratio.
    Vectors (norms, biases) have no ratio: they move as under AdamW.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "matrices": 1})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                assert parameter.grad is not None
                state = self.state[parameter]
                first, second = state["exp_avg"], state["exp_avg_sq"]
                state["step"] += 1
                steps = int(state["step"])
                first.lerp_(parameter.grad, 1 - beta1)
                second.mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                direction = first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt_() + group["eps"])
                update = direction + group["weight_decay"] * parameter
                if parameter.ndim >= 2:
                    parts = (tensor.chunk(group["matrices"], -1) for tensor in (parameter, direction, update))
                    for weights, directions, updates in zip(*parts, strict=True):
                        updates *= trust_ratio(weights, directions, updates)
                parameter.sub_(update, alpha=group["lr"])


def trust_ratio(weight: Tensor, direction: Tensor, update: Tensor) -> Tensor:
    """The norm of every matrix over that of its update, [..., 1, 1].

    It is 1 for a matrix of zeros, which otherwise could never move, and where Adam has no direction: an expert that
    never had a token decays as under AdamW, not by `lr` per step.
    """
    weights, directions, updates = (
        torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True) for tensor in (weight, direction, update)
    )
    return torch.where((weights > 0) & (directions > 0), weights / updates, 1.0)
