"""Grouped-query attention with QK-norm; what a query may see is decided by an `Attend` given from outside.

Training packs documents into rows and attends within segments (`PackedAttention`); generation fills a KV cache
from packed prompts (`PrefillAttention`) and then reads it, one token a row (`CachedAttention`). The layer is the
same in all three. Latent attention (`latent_attention.py`) is given the same three.

Shapes: B rows, S positions, T = B*S flattened tokens, D hidden_size, H query heads, K key-value heads, N head size,
M head size of the values where it is another one.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.kernels import few_rows
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.layers import Linear, RMSNorm
from moe_lm.model.rotary import Angles, rotate


class Attend(Protocol):
    """Causal attention of `q [B, S, H, N]` over `k [B, S, K, N], v [B, S, K, M]` and what came before: `[B, S, H, M]`.

    Products are multiplied with `scale`, 1/sqrt(N) when None. `kept` is what a cache keeps in place of k and v.
    """

    @property
    def from_cache(self) -> bool:
        """Whether what came before is there only as a cache has kept it."""
        ...

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, kept: Tensor | None = None
    ) -> Tensor: ...


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245).

    With `use_qk_norm` queries and keys are RMS-normed, each head by itself or all heads together (OLMoE).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size, self.interleave = config.head_size, config.rope_interleave
        hidden, size, bias = config.hidden_size, config.head_size, config.attention_bias
        self.q_proj = Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = Linear(hidden, config.kv_heads * size, bias=bias)
        self.v_proj = Linear(hidden, config.kv_heads * size, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * size, hidden, bias=config.attention_out_bias)
        self.norms_heads = config.qk_norm_over == "head"
        queries, keys = (1, 1) if self.norms_heads else (config.num_attention_heads, config.kv_heads)
        self.q_norm = RMSNorm(queries * size, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(keys * size, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, angles: Angles | None, attend: Attend) -> Tensor:
        if few_rows.serves(x_BSD, self.o_proj.weight) and self._plain():
            layers, norms, eps = (self.q_proj, self.k_proj, self.v_proj), None, 0.0
            if isinstance(self.q_norm, RMSNorm) and isinstance(self.k_norm, RMSNorm):
                norms, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
            q, k, v = few_rows.project(x_BSD, layers, norms, eps, self.head_size, angles, self.interleave)
            return self.o_proj(attend(self.layer, q, k, v).flatten(-2))
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self._heads(self.v_proj(x_BSD))
        if self.norms_heads:
            q, k = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        else:
            q, k = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        if angles is not None:
            q, k = (rotate(x, *angles, self.interleave) for x in (q, k))
        return self.o_proj(attend(self.layer, q, k, v).flatten(-2))

    def _plain(self) -> bool:
        """Whether no adapter changes the first products."""
        return type(self.q_proj) is type(self.k_proj) is type(self.v_proj) is Linear

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within segments of the flattened tokens, for training and scoring.

    `cu_seqlens [segments + 1]` int32 are the segments' boundaries in `0..B*S`; `max_seqlen` is the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    from_cache: ClassVar[bool] = False

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, kept: Tensor | None = None
    ) -> Tensor:
        rows = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attention(q, k, v, self.cu_seqlens, self.max_seqlen, scale).unflatten(0, rows)


@dataclass(frozen=True)
class PrefillAttention:
    """Attention over packed prompts `[1, T]`, one segment a cache row, that also fills the cache.

    The caller sets `cache.lengths` once all layers have run.
    """

    cache: KVCache
    lengths: list[int]
    cu_seqlens: Tensor
    from_cache: ClassVar[bool] = False

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, kept: Tensor | None = None
    ) -> Tensor:
        keys, values = (k[0], v[0]) if kept is None else (kept[0], kept[0, ..., : self.cache.latent_size])
        pieces = zip(keys.split(self.lengths), values.split(self.lengths), strict=True)
        for row, (row_keys, row_values) in enumerate(pieces):
            self.cache.keys[layer, row, :, : len(row_keys)] = row_keys.transpose(0, 1)
            self.cache.values[layer, row, :, : len(row_values)] = row_values.transpose(0, 1)
        return PackedAttention(self.cu_seqlens.to(q.device), max(self.lengths))(layer, q, k, v, scale)


class CachedAttention:
    """Attention of new tokens `[rows, S]` over each row's cache, which they are appended to.

    k and v are what the cache keeps of them. Serves one pass through the layers: the caller advances `cache.lengths`
    by S once all of them have run.
    """

    from_cache: ClassVar[bool] = True

    def __init__(self, cache: KVCache) -> None:
        self.keys, self.values, self.lengths = cache.keys, cache.values, cache.lengths
        self.values_in_keys = cache.latent_size is not None
        lengths = cache.lengths.tolist()
        self.longest, self.even = max(lengths), min(lengths) == max(lengths)
        self._of_new: tuple[tuple[int, torch.device], Tensor, Tensor | None] | None = None

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, kept: Tensor | None = None
    ) -> Tensor:
        new, key_heads = q.shape[1], k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        if new == 1 and few_rows.serves(q, keys):
            separate = None if self.values_in_keys else v
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            if self.longest >= keys.shape[2]:  # torch would see it by itself
                raise IndexError(f"a row of the cache holds {self.longest} positions and has room for no other")
            return few_rows.attend(q, k, separate, keys, values, self.lengths.to(q.device), scale)
        sharing = q.shape[2] // key_heads
        positions, visible = self._positions(new, sharing, q.device)
        stop = self.longest + new
        if self.even:  # no index: the places are the same in every row
            keys[:, :, self.longest : stop] = k.transpose(1, 2)
            values[:, :, self.longest : stop] = v.transpose(1, 2)
        else:
            rows = torch.arange(len(q), device=q.device)[:, None]
            keys[rows, :, positions] = k.to(keys.dtype)
            values[rows, :, positions] = v.to(values.dtype)
        # The query heads that share a key head attend as further positions: no copy of the keys for each of them.
        out = F.scaled_dot_product_attention(
            q.unflatten(2, (key_heads, sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3),
            keys[:, :, :stop].to(q.dtype),
            values[:, :, :stop].to(q.dtype),
            attn_mask=visible,
            scale=scale,
        )
        return out.unflatten(2, (sharing, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _positions(self, new: int, sharing: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions of the new tokens `[rows, S]` and which places they see; None when all of them. Once a pass."""
        if self._of_new is None or self._of_new[0] != (new, device):
            positions, visible = self.lengths[:, None].to(device) + torch.arange(new, device=device), None
            if new > 1 or not self.even:
                places = torch.arange(self.longest + new, device=device)
                visible = (places <= positions[:, None, :, None]).repeat(1, 1, sharing, 1)
            self._of_new = ((new, device), positions, visible)
        return self._of_new[1:]


class StaticAttention(CachedAttention):
    """The same with shapes that do not depend on the lengths: every query reads the whole cache, behind a mask."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths
        self.longest, self.even = keys.shape[3] - 1, False
        self._of_new = None


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float | None = None
) -> Tensor:
    """Causal attention within segments: `q [T, H, N]`, `k [T, K, N]`, `v [T, K, M]` -> `[T, H, M]`.

    flash-attn serves CUDA when it is installed and the data type is one it takes, PyTorch's varlen flash attention
    when it is not; every other device attends segment by segment with PyTorch's fused attention.
    """
    scale, values = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    if q.shape[-1] != values:  # the kernels take one head size: zeros change no product, and are cut off the values
        width = max(q.shape[-1], values)
        q, k, v = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        return _cuda_attention()(q, k, v, cu_seqlens, max_seqlen, scale)[..., :values]
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    if q.device.type == "cpu":
        # The kernel takes for granted that the head size is innermost in memory, and is silently wrong otherwise.
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        attend = _segment_attention if _needs_operator() else _attend_in_segments
        return attend(q, k, v, cu_seqlens, scale)[0][..., :values]
    return _portable_attention(q, k, v, cu_seqlens, scale)[..., :values]


def _cuda_attention() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]:
    if importlib.util.find_spec("flash_attn") is not None:
        return _flash_attn
    return _torch_varlen


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *ends, *longest, softmax_scale=scale, causal=True)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    ends, longest = (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen)
    out = varlen_attn(q, k, v, *ends, *longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a pair only where the log-sum-exp is asked for
    return out


def _portable_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    pieces = []
    for start, stop in _segments(cu_seqlens):
        q_part, k_part, v_part = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_part, k_part, v_part, is_causal=True, scale=scale)
        pieces.append(out.transpose(1, 2)[0])
    return torch.cat(pieces)


def _needs_operator() -> bool:
    """Operators of our own are for gradients and compilation; their first call alone costs half a second."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


# On a CPU the loop over segments is one opaque operator: `torch.compile` neither unrolls it nor recompiles when the
# number of documents in a batch changes, and no work is spent on pairs that a dense mask would throw away.


def _attend_in_segments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[T, H, N]` and log-sum-exp `[T, H]` of causal attention within segments."""
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
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("moe_lm::segment_attention_backward", mutates_args=())
def _segment_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, cu_seqlens: Tensor, scale: float
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
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape, dtype=q.dtype)


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
    q, k, v, out, log_sum_exp, cu_seqlens = ctx.saved_tensors
    return *_segment_attention_backward(grad, q, k, v, out, log_sum_exp, cu_seqlens, ctx.scale), None, None


_segment_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _rows_of(x: Tensor, start: int, stop: int, rows: int) -> Tensor:
    """`[T, H, ...]` -> `[rows, H, length, ...]`, a view of equally long neighbouring segments."""
    return x[start:stop].unflatten(0, (rows, -1)).transpose(1, 2)


def _segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    return [(start, stop) for start, stop in itertools.pairwise(bounds) if stop > start]


def _equal_runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring segments of the same length as one (start, stop, number of segments)."""
    runs: list[tuple[int, int, int]] = []
    for start, stop in _segments(cu_seqlens):
        if runs and (runs[-1][1] - runs[-1][0]) // runs[-1][2] == stop - start:
            runs[-1] = (runs[-1][0], stop, runs[-1][2] + 1)
        else:
            runs.append((start, stop, 1))
    return runs
