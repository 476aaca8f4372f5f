"""Muon for hidden matrices: momentum whose update is orthogonalised."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz (Keller Jordan, 2024), for 2-D and stacked 3-D weights.

    On a 2-D weight it equals `torch.optim.Muon` (tested), which takes only 2-D weights, one at a time. Here all
    matrices of the same shape, of any layer or expert, are orthogonalised in one batched product. The update is scaled
    by `sqrt(max(1, rows / columns))` of the matrix as output x input, so that one rate suits every shape; an expert of
    a stack [E, in, out] moves as the linear layer [out, in] that it is. A group's `matrices` says how many lie side by
    side in each of its parameters; each is orthogonalised by itself. `dtype`: what Newton-Schulz computes in.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "matrices": 1})
        self._dtype = dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor, dict[str, Any]]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                both = (parameter, self._nesterov(parameter, group))
                parts = (tensor.chunk(group["matrices"], -1) for tensor in both)
                for weight, update in zip(*parts, strict=True):
                    by_shape[weight.shape[-2:]].append((weight, update, group))
        for same in by_shape.values():
            updates = [update.reshape(-1, *update.shape[-2:]) for _, update, _ in same]
            pieces = orthogonalise(torch.cat(updates), self._dtype).split([len(update) for update in updates])
            for (weight, _, group), piece in zip(same, pieces, strict=True):
                out_size, in_size = weight.shape if weight.ndim == 2 else weight.shape[:0:-1]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(piece.view_as(weight), alpha=-group["lr"] * math.sqrt(max(1.0, out_size / in_size)))

    def _nesterov(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        assert parameter.grad is not None
        buffer: Tensor = self.state[parameter]["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        return torch.lerp(parameter.grad, buffer, group["momentum"])


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix of each in `[N, rows, columns]`, approximately, by Newton-Schulz in `dtype`.

    The quintic's coefficients are Muon's; singular values end between about 0.7 and 1.2. Small ones are multiplied by
    up to 500, and so is rounding: in bfloat16, which is enough to train well, layouts differ by more than in float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype)
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # Fused, as torch does it: in bfloat16 every intermediate result would be rounded.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if transposed else x).to(matrices.dtype)
