"""LAMB for large batches (You et al. 2020, arXiv 1904.00962): Adam's direction with a length set per matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.optim.matrices import Part, Share, ShareOf, whole


class Lamb(torch.optim.Optimizer):
    """Algorithm 2 of the paper, with bias correction and phi the identity.

    A matrix moves by `lr` times its own norm, whatever the norm of its gradient: `x -= lr * |x| / |u| * u` with
    `u = m / (sqrt(v) + eps) + weight_decay * x`. Each expert of a stack [E, in, out] is a matrix with its own ratio.
    Vectors (norms, biases) have no ratio: they move as under AdamW.

    A group's `matrices` says how many lie side by side in each of its parameters; each has its own ratio. `share_of`:
    which elements of a group's parameters are in its tensors; norms are summed over the ranks, on `device`, by default
    that of the weights. A step overwrites the gradients, which saves their size in memory.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        share_of: ShareOf = whole,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "matrices": 1})
        self._shares: list[Share] = []
        self._device = device
        for group in self.param_groups:
            self._shares.append(share_of(group["params"]))
            for tensor in group["params"]:
                self.state[tensor] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(tensor),
                    "exp_avg_sq": torch.zeros_like(tensor),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group, share in zip(self.param_groups, self._shares, strict=True):
            for tensor in group["params"]:
                self.state[tensor]["step"] += 1
            norms = _Norms(share, group["matrices"], self._device or group["params"][0].device)
            updates = [self._update(part, group, norms) for part in share.own]
            ratios = norms.ratios()
            for part, update in zip(share.own, updates, strict=True):
                weight = _flat(group["params"][part.tensor], part)
                weight.sub_(norms.scaled(part, update, ratios), alpha=group["lr"])

    def _update(self, part: Part, group: dict[str, Any], norms: _Norms) -> Tensor:
        """A part's update without its ratio, in place of the gradient."""
        tensor, (beta1, beta2) = group["params"][part.tensor], group["betas"]
        assert tensor.grad is not None
        state = self.state[tensor]
        steps = int(state["step"])
        weight, update = _flat(tensor, part), _flat(tensor.grad, part)
        first, second = _flat(state["exp_avg"], part), _flat(state["exp_avg_sq"], part)
        first.lerp_(update, 1 - beta1)
        second.mul_(beta2).addcmul_(update, update, value=1 - beta2)
        direction = first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt_() + group["eps"])
        torch.add(direction, weight, alpha=group["weight_decay"], out=update)
        norms.add(part, weight, direction, update)
        return update


class _Norms:
    """The norms of a group's matrices, out of their parts on all ranks: of the weights, Adam's direction, the update.

    Matrices are numbered through the parameters; a parameter has `[experts, matrices]` of them.
    """

    def __init__(self, share: Share, matrices: int, device: torch.device) -> None:
        self._share, self._matrices = share, matrices
        shapes = dict(sorted({part.parameter: part.shape for parts in share.parts for part in parts}.items()))
        self._first, total = dict[int, int](), 0
        for parameter, shape in shapes.items():
            self._first[parameter] = total
            total += math.prod(shape[:-2])
        self._squares = torch.zeros(3, total, matrices, device=device)

    def add(self, part: Part, *tensors: Tensor) -> None:
        if len(part.shape) < 2:
            return
        rows, above, below = self._rows(part)
        here = torch.stack([self._by_row(part, tensor).square().sum(-1) for tensor in tensors])
        # Sums of rows are few: to whole matrices they may be filled up with zeros.
        sums = F.pad(here, (0, 0, above, below)).unflatten(1, (-1, rows)).sum(2)
        first = self._first[part.parameter] + part.start // math.prod(part.shape[-2:])
        self._squares[:, first : first + sums.shape[1]] += sums.to(self._squares.device)

    def ratios(self) -> Tensor:
        """The norm of every matrix over that of its update.

        It is 1 for a matrix of zeros, which otherwise could never move, and where Adam has no direction: an expert that
        never had a token decays as under AdamW, not by `lr` per step.
        """
        ranks = self._share.ranks
        squares = ranks.sum(self._squares) if ranks is not None and self._share.divided else self._squares
        weights, directions, updates = squares.sqrt()
        return torch.where((weights > 0) & (directions > 0), weights / updates, 1.0)

    def scaled(self, part: Part, update: Tensor, ratios: Tensor) -> Tensor:
        """A part's update with the ratios of its matrices."""
        if len(part.shape) < 2:
            return update
        rows, above, _ = self._rows(part)
        by_row = self._by_row(part, update)
        first = self._first[part.parameter] + part.start // math.prod(part.shape[-2:])
        of_rows = ratios[first:].to(update.device).repeat_interleave(rows, 0)[above : above + len(by_row)]
        before = part.start % part.shape[-1]
        return (by_row * of_rows[..., None]).flatten()[before : before + part.length]

    def _rows(self, part: Part) -> tuple[int, int, int]:
        """The rows of a matrix, and how many of the first and last one are above and below this part."""
        rows, columns = part.shape[-2:]
        first, last = part.start // columns, math.ceil((part.start + part.length) / columns)
        return rows, first % rows, -last % rows

    def _by_row(self, part: Part, tensor: Tensor) -> Tensor:
        """`[rows, matrices, columns]`; what the first and last row lack of this part is zero."""
        columns = part.shape[-1]
        before, after = part.start % columns, -(part.start + part.length) % columns
        padded = F.pad(tensor, (before, after)) if before or after else tensor
        return padded.view(-1, self._matrices, columns // self._matrices)


def _flat(tensor: Tensor, part: Part) -> Tensor:
    return tensor.view(-1).narrow(0, part.offset, part.length)
