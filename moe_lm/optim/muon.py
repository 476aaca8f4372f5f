"""Muon for hidden matrices: momentum whose update is orthogonalised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moe_lm.optim.matrices import Batch, ShareOf, Travel, whole

STEPS = 5  # of Newton-Schulz


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (Keller Jordan, 2024), for 2-D and stacked 3-D weights.

    On a 2-D weight it equals `torch.optim.Muon` (tested), which takes only 2-D weights, one at a time. Here matrices
    of the same shape, of any layer or expert, are orthogonalised in one batched product, so many at once as a limit in
    bytes has room for. The update is scaled by `sqrt(max(1, rows / columns))` of the matrix as output x input, so that
    one rate suits every shape; an expert of a stack [E, in, out] moves as the linear layer [out, in] that it is. A
    group's `matrices` says how many lie side by side in each of its parameters; each is orthogonalised by itself.

    `dtype`: what Newton-Schulz computes in, on `device`, by default that of the weights. `share_of`: which elements of
    a group's parameters are in its tensors; each matrix is orthogonalised once, by one rank. A step overwrites the
    gradients, which saves their size in memory.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
        share_of: ShareOf = whole,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1})
        self._travels: list[Travel] = []
        for group in self.param_groups:
            tensors: list[Tensor] = group["params"]
            self._travels.append(Travel(share_of(tensors), dtype, device or tensors[0].device))
            for tensor in tensors:
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group, travel in zip(self.param_groups, self._travels, strict=True):
            updates = [self._nesterov(tensor, group).reshape(-1) for tensor in group["params"]]
            weights = [tensor.view(-1) for tensor in group["params"]]
            for weight in weights:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
            for batch in travel.batches:
                results = _orthogonalise_blocks(travel.there(batch, updates), group["matrices"])
                rate = group["lr"] * _scale(batch, group["matrices"])
                for weight, result in travel.back(batch, results, weights):
                    weight.add_(result, alpha=-rate)

    def _nesterov(self, tensor: Tensor, group: dict[str, Any]) -> Tensor:
        """In place of the gradient."""
        assert tensor.grad is not None
        buffer: Tensor = self.state[tensor]["momentum_buffer"]
        buffer.lerp_(tensor.grad, 1 - group["momentum"])
        return tensor.grad.lerp_(buffer, group["momentum"])


def _scale(batch: Batch, matrices: int) -> float:
    rows, columns = batch.rows, batch.columns // matrices
    out_size, in_size = (columns, rows) if batch.stacked else (rows, columns)
    return math.sqrt(max(1.0, out_size / in_size))


def _orthogonalise_blocks(blocks: Tensor, matrices: int) -> Tensor:
    """`[N, rows, m * columns]`, of m matrices side by side."""
    if matrices == 1 or not len(blocks):
        return orthogonalise(blocks)
    apart = blocks.unflatten(-1, (matrices, -1)).transpose(1, 2)
    return orthogonalise(apart.flatten(0, 1)).view(apart.shape).transpose(1, 2).flatten(2)


def orthogonalise(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """The nearest semi-orthogonal matrix of each in `[N, rows, columns]`, approximately, by Newton-Schulz.

    The quintic's coefficients are Muon's; singular values end between about 0.7 and 1.2. Small ones are multiplied by
    up to 500, and so is rounding: in bfloat16, which is enough to train well, layouts differ by more than in float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # Fused, as torch does it: in bfloat16 every intermediate result would be rounded.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x
