"""Attention within segments on a CPU, with the signature of `model.attention.segment_attention`.

Shapes: T flattened tokens, H query heads, K key-value heads, N head size, M head size of the values.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef


def segments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """PyTorch's fused attention for CPUs, over runs of equally long segments at once, as one opaque operator.

    So `torch.compile` neither unrolls the loop nor recompiles when the number of documents in a batch changes, and no
    work is spent on pairs that a dense mask would throw away.
    """
    values = v.shape[-1]
    q, k, v = _repeated(*padded(q, k, v))
    # The kernel takes for granted that the head size is innermost in memory, and is silently wrong otherwise.
    q, k, v = innermost(q, k, v)
    # The operator is for gradients and compilation; its first call costs half a second.
    needs_operator = torch.is_grad_enabled() or torch.compiler.is_compiling()
    attend = _segment_attention if needs_operator else _attend_in_segments
    return attend(q, k, v, cu_seqlens, max_seqlen, scale)[0][..., :values]


def padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one head size, which the kernels demand: zeros change no product, and are cut off the values."""
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def innermost(*tensors: Tensor) -> list[Tensor]:
    """The same with the head size innermost in memory."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A key-value head for every query head."""
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return q, k, v


def _attend_in_segments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, N]` and log-sum-exp `[T, H]`. The longest segment is for who counts what the operator does."""
    out = torch.empty(q.shape, dtype=q.dtype)
    log_sum_exp = torch.empty(q.shape[:2], dtype=torch.float32)
    for start, stop, rows in _equal_runs(cu_seqlens):
        views = (_rows_of(x, start, stop, rows) for x in (q, k, v))
        piece, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*views, 0.0, True, scale=scale)
        _rows_of(out, start, stop, rows).copy_(piece)
        _rows_of(log_sum_exp, start, stop, rows).copy_(lse)
    return out, log_sum_exp


_segment_attention = torch.library.custom_op("moe_lm::segment_attention", _attend_in_segments, mutates_args=())


@_segment_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("moe_lm::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(torch.empty(q.shape, dtype=q.dtype) for _ in range(3))
    for start, stop, rows in _equal_runs(cu_seqlens):
        views = [_rows_of(x, start, stop, rows) for x in (grad, q, k, v, out, log_sum_exp)]
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*views, 0.0, True, scale=scale)
        for whole, piece in zip(grads, pieces, strict=True):
            _rows_of(whole, start, stop, rows).copy_(piece)
    return grads[0], grads[1], grads[2]


@_segment_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape, dtype=q.dtype)


def register_backward(operator: CustomOpDef, backward: CustomOpDef) -> None:
    """Make `backward` the gradient of an operator of attention within segments.

    The operator takes what `segment_attention` takes, and returns output and log-sum-exp. `backward` takes the output's
    gradient, q, k, v, both results, and the rest of the operator's arguments.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens)

    def gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors, ctx.max_seqlen, ctx.scale), None, None, None

    operator.register_autograd(gradient, setup_context=save)


register_backward(_segment_attention, _segment_attention_backward)


def _rows_of(x: Tensor, start: int, stop: int, rows: int) -> Tensor:
    """`[T, H, ...]` -> `[rows, H, length, ...]`, a view of equally long neighbouring segments."""
    return x[start:stop].unflatten(0, (rows, -1)).transpose(1, 2)


def _equal_runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring segments of the same length as one (start, stop, number of segments)."""
    runs: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        if start == stop:
            continue
        if runs and (runs[-1][1] - runs[-1][0]) // runs[-1][2] == stop - start:
            runs[-1] = (runs[-1][0], stop, runs[-1][2] + 1)
        else:
            runs.append((start, stop, 1))
    return runs
