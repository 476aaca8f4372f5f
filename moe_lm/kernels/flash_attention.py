"""Attention within segments on CUDA, with the signature of `model.attention.segment_attention`.

Which of these serve on a machine is decided in `available`. They read grouped keys as they are. Head sizes of keys and
values must be the same but in (192, 128) of FlashAttention 3 and 4; otherwise the smaller ones are padded.

Shapes: T flattened tokens, H query heads, K key-value heads, N head size, M head size of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_lm.kernels.attention import padded, register_backward
from moe_lm.model.attention import segment_attention


def flash_attn_2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """FlashAttention 2 (arXiv 2307.08691) of the package flash-attn, for CUDA in bfloat16 and float16."""
    if not _is_half(q):
        return segment_attention(q, k, v, cu_seqlens, max_seqlen, scale)
    from flash_attn import flash_attn_varlen_func

    values, ends, longest = v.shape[-1], (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    out = flash_attn_varlen_func(*padded(q, k, v), *ends, *longest, softmax_scale=scale, causal=True)
    return out[..., :values]


def torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """PyTorch's own FlashAttention 2, for CUDA in bfloat16 and float16."""
    if not _is_half(q):
        return segment_attention(q, k, v, cu_seqlens, max_seqlen, scale)
    from torch.nn.attention.varlen import varlen_attn

    values, ends, longest = v.shape[-1], (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    q, k, v = padded(q, k, v)
    out = varlen_attn(q, k, v, *ends, *longest, scale=scale, window_size=(-1, 0), enable_gqa=q.shape[1] > k.shape[1])
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out[..., :values]


UNEVEN_SIZES = (192, 128)  # of keys and values in DeepSeek's latent attention, which FlashAttention 3 and 4 take


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """FlashAttention 3 (arXiv 2407.08608), once it is put in the place of PyTorch's own (`available.activate`)."""
    if _is_half(q) and (q.shape[-1], v.shape[-1]) == UNEVEN_SIZES:
        return _uneven_attention(q, k, v, cu_seqlens, max_seqlen, scale)[0]
    return torch_varlen(q, k, v, cu_seqlens, max_seqlen, scale)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """FlashAttention 4 (arXiv 2603.05451), put in its place in the same way."""
    return flash_attn_3(q, k, v, cu_seqlens, max_seqlen, scale)


@torch.library.custom_op("moe_lm::uneven_attention", mutates_args=())
def _uneven_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output `[T, H, M]` and log-sum-exp `[H, T]`. `varlen_attn` tells a compiler that the output is as wide as q."""
    ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    forward = torch.ops.aten._flash_attention_forward
    out, log_sum_exp, *_ = forward(q, k, v, *ends, *longest, 0.0, True, False, scale=scale)
    return out, log_sum_exp


@_uneven_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q.shape
    return q.new_empty(tokens, heads, v.shape[-1]), q.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("moe_lm::uneven_attention_backward", mutates_args=())
def _uneven_attention_backward(
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
    ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # no dropout
    backward = torch.ops.aten._flash_attention_backward
    return backward(grad, q, k, v, out, log_sum_exp, *ends, *longest, 0.0, True, seed, unused, scale=scale)


@_uneven_attention_backward.register_fake
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
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


register_backward(_uneven_attention, _uneven_attention_backward)


def _is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)
