"""Kernels for the experts: grouped matrix products, each with the signature of `model.moe.grouped_mm`, every expert's
rows times its own weights; and the activation between the two.

Shapes: R rows sorted by expert, E experts, D inputs, F outputs. `ends [E]` int32: expert e has rows ends[e-1]..ends[e].
Between the products F is an expert's width; `wide` is `[R, 2F]`, gate and up side by side, or `[R, F]` without a gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_lm.model import moe

BUCKET = 64  # rows
BLOCK = 1024  # rows for each thread

# The gradient of an activation's input, from that of its output and the input.
SLOPES: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    F.silu: torch.ops.aten.silu_backward,
    F.gelu: torch.ops.aten.gelu_backward,
    F.relu: lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


def fused(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """PyTorch's own kernel, which fuses the products on CUDA."""
    if len(x_RD) == 0:  # no token came to these experts
        return x_RD @ weight_EDF[0]
    return F.grouped_mm(x_RD, weight_EDF, offs=ends_E)


def bucketed(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """For training on a CPU, where `fused` is a loop of matrix products whose sizes, the loads of the experts, are new
    in every step.

    oneDNN generates code for every new size: three quarters of the time went there (eval/LOG.md). Here the sizes are
    rounded up to multiples of BUCKET, so that after a few steps none is new.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _rows_by_weights(x_RD, weight_EDF, ends_E)
    return fused(x_RD, weight_EDF, ends_E)


@torch.library.custom_op("moe_lm::rows_by_weights", mutates_args=())
def _rows_by_weights(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    """`[R, F]`. A product takes rows of the next experts along; their own products, which follow, overwrite those."""
    rows = len(x_RD)
    out_RF = x_RD.new_empty(rows, weight_EDF.shape[-1])
    start = 0
    for weight, end in zip(weight_EDF, ends_E.tolist(), strict=True):
        stop = start + _rounded(end - start)
        if stop <= rows:
            torch.mm(x_RD[start:stop], weight, out=out_RF[start:stop])
        else:  # the last experts have too few rows behind them, so theirs are copied
            out_RF[start:end] = torch.mm(_padded(x_RD[start:end]), weight)[: end - start]
        start = end
    return out_RF


@_rows_by_weights.register_fake
def _(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], weight_EDF.shape[-1])


@torch.library.custom_op("moe_lm::rows_by_rows", mutates_args=())
def _rows_by_rows(x_RD: Tensor, grad_RF: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of the weights, `[E, D, F]`: each expert's rows of x, transposed, times its rows of the gradient."""
    grad_EDF = x_RD.new_empty(len(ends_E), x_RD.shape[-1], grad_RF.shape[-1])
    start = 0
    for weight_grad, end in zip(grad_EDF, ends_E.tolist(), strict=True):
        torch.mm(_padded(x_RD[start:end]).T, _padded(grad_RF[start:end]), out=weight_grad)
        start = end
    return grad_EDF


@_rows_by_rows.register_fake
def _(x_RD: Tensor, grad_RF: Tensor, ends_E: Tensor) -> Tensor:
    return x_RD.new_empty(len(ends_E), x_RD.shape[-1], grad_RF.shape[-1])


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x_RD, weight_EDF, ends_E = ctx.saved_tensors
    x_grad = _rows_by_weights(grad_RF, weight_EDF.mT, ends_E) if ctx.needs_input_grad[0] else None
    weight_grad = _rows_by_rows(x_RD, grad_RF, ends_E) if ctx.needs_input_grad[1] else None
    return x_grad, weight_grad, None


_rows_by_weights.register_autograd(_backward, setup_context=_save_for_backward)


def _rounded(rows: int) -> int:
    return -(-rows // BUCKET) * BUCKET


def _padded(rows: Tensor) -> Tensor:
    """Zeros behind the rows, up to a multiple of BUCKET."""
    padded = rows.new_zeros(_rounded(len(rows)), rows.shape[-1])
    padded[: len(rows)] = rows
    return padded


def kept_narrow(
    wide: Tensor, weights_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool, block: int | None = None
) -> Tensor:
    """`model.moe.weighted_activation`, which keeps its inputs alone for the backward pass; `block` rows at once.

    That equation leaves autograd four float32 tensors as wide as the experts. Here they are computed again from the
    first product, which is in the data type of products. A compiler fuses the equation and decides itself what to keep.
    """
    if torch.compiler.is_compiling() or activation not in SLOPES:
        return moe.weighted_activation(wide, weights_R, activation, gated)
    return _WeightedActivation.apply(wide, weights_R, activation, gated, block or max(1, len(wide)))


def kept_narrow_in_blocks(
    wide: Tensor, weights_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool
) -> Tensor:
    """`kept_narrow` for a CPU: what is in between stays in its caches."""
    # A compiler cannot trace the question for threads, and cuts its graph there.
    block = None if torch.compiler.is_compiling() else BLOCK * torch.get_num_threads()
    return kept_narrow(wide, weights_R, activation, gated, block)


class _WeightedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, wide: Tensor, weights_R: Tensor, activation: Callable[[Tensor], Tensor], gated: bool, block: int
    ) -> Tensor:
        ctx.save_for_backward(wide, weights_R)
        ctx.activation, ctx.gated, ctx.block = activation, gated, block
        if len(wide) <= block:
            return moe.weighted_activation(wide, weights_R, activation, gated)
        hidden_RF = wide.new_empty(len(wide), wide.shape[1] // (2 if gated else 1))
        for x, weights, hidden in _blocks(block, wide, weights_R, hidden_RF):
            hidden.copy_(moe.weighted_activation(x, weights, activation, gated))
        return hidden_RF

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        wide, weights_R = ctx.saved_tensors
        wide_grad, weights_grad_R = torch.empty_like(wide), torch.empty_like(weights_R)
        tensors = (wide, weights_R, grad_RF, wide_grad, weights_grad_R)
        for x, weights, grad, x_grad, weights_grad in _blocks(ctx.block, *tensors):
            first, *up = moe.in_float32(x).chunk(2 if ctx.gated else 1, -1)
            first_grad, *up_grad = x_grad.chunk(2 if ctx.gated else 1, -1)
            grad, weights = moe.in_float32(grad), weights[:, None]
            activated = ctx.activation(first)
            slices = grad * activated
            torch.sum(slices.mul_(up[0]) if ctx.gated else slices, -1, out=weights_grad)
            grad = grad * weights
            if ctx.gated:
                up_grad[0].copy_(activated.mul_(grad))
                grad.mul_(up[0])
            first_grad.copy_(SLOPES[ctx.activation](grad, first))
        return wide_grad, weights_grad_R, None, None, None


def _blocks(block: int, *tensors: Tensor) -> Any:
    return zip(*(tensor.split(block) for tensor in tensors), strict=True)
