"""Attention within segments in C++ (native/attention.cpp), for CPUs that multiply bfloat16 in hardware.

Shapes: T flattened tokens, H query heads, K key-value heads, N head size, M head size of the values.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from moe_lm.kernels.attention import innermost, register_backward, segments
from moe_lm.kernels.native import build

LANES = 16  # bfloat16 numbers that head sizes must be multiples of


def cpp(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """For bfloat16 and head sizes that are multiples of 16; the others run in `segments`."""
    sizes = (q.shape[-1], v.shape[-1])
    if q.dtype != torch.bfloat16 or any(size % LANES for size in sizes):
        return segments(q, k, v, cu_seqlens, max_seqlen, scale)
    return _cpu_attention(q, k, v, cu_seqlens, max_seqlen, scale)[0]


def load() -> ctypes.CDLL:
    """The functions of the C++, compiled where they have not been yet. Raises UnavailableError with the reason."""
    unable = build.UnavailableError("this processor does not multiply bfloat16 (AVX-512 BF16)")
    if not torch.cpu._is_avx512_bf16_supported():
        raise unable
    library = build.load()
    if not library.attention_serves():
        raise unable
    return library


@torch.library.custom_op("moe_lm::cpu_attention", mutates_args=())
def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, M]` and log-sum-exp `[H, T]`. The longest segment is for who counts what the operator does."""
    q, k, v = innermost(q, k, v)
    out, log_sum_exp = _outputs(q, v)
    arguments = _arguments(q, k, v, cu_seqlens, scale)
    _library().attention_forward(*arguments, *_addresses(q, k, v, out, log_sum_exp))
    return out, log_sum_exp


@_cpu_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, v.shape[-1]), q.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("moe_lm::cpu_attention_backward", mutates_args=())
def _cpu_attention_backward(
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
    q, k, v = innermost(q, k, v)
    grad = grad.contiguous()
    grads = _gradients(q, k, v)
    arguments = _arguments(q, k, v, cu_seqlens, scale)
    _library().attention_backward(*arguments, *_addresses(grad, q, k, v, out, log_sum_exp, *grads))
    return grads


@_cpu_attention_backward.register_fake
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
    return _gradients(q, k, v)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register_backward(_cpu_attention, _cpu_attention_backward)


class _Shape(ctypes.Structure):
    """`Shape` of the C++. Strides are in numbers."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("segments", "heads", "key_heads", "size", "values")),
        *((f"{name}_{of}", ctypes.c_int64) for name in "qkv" for of in ("token", "head")),
        ("scale", ctypes.c_float),
    ]


def _arguments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Any, ...]:
    strides = (stride for x in (q, k, v) for stride in x.stride()[:2])
    shape = _Shape(len(cu_seqlens) - 1, q.shape[1], k.shape[1], q.shape[2], v.shape[2], *strides, scale)
    return ctypes.byref(shape), ctypes.c_void_p(cu_seqlens.data_ptr()), ctypes.c_int64(len(q))


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


_library = functools.cache(load)
