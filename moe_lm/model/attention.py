"""Grouped-query attention with QK-norm; an `Attend` given from outside decides what a query may see.

Training packs documents into rows and attends within segments (`PackedAttention`); generation fills a KV cache from
packed prompts (`PrefillAttention`) and then reads it, one token a row (`CachedAttention`). The layer is the same in
all three, and where ranks share rows (parallel/sequence_parallel.py). Latent attention (latent_attention.py) is given
the same ones.

Shapes: B rows, S positions, T = B*S flattened tokens, D hidden_size, H query heads, K key-value heads, N head size,
M head size of the values, which is N but in latent attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_lm.config.model import ModelConfig
from moe_lm.model.kv_cache import ByLayer, KVCache
from moe_lm.model.layers import RMSNorm
from moe_lm.model.rotary import Angles, rotate


class Attend(Protocol):
    """Causal attention of `q [B, S, H, N]` over `k [B, S, K, N], v [B, S, K, M]` and earlier positions: `[B, S, H, M]`.

    `layer` says its index, its scale and its kernel. `kept` is what a cache stores in place of k and v.
    """

    @property
    def from_cache(self) -> bool:
        """Whether earlier positions are there only as a cache has stored them."""
        ...

    def __call__(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None
    ) -> Tensor: ...


# Causal attention within segments of flattened tokens: q, k, v, cu_seqlens, max_seqlen, scale -> `[T, H, M]`.
SegmentAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


class AttentionLayer(nn.Module):
    """The attributes that every attention layer has. Products of queries and keys are multiplied with `scale`.

    Kernels replace `segment_attention` and `rotate` (kernels/kernels.py).
    """

    def __init__(self, config: ModelConfig, index: int, scale: float) -> None:
        super().__init__()
        self.index, self.scale, self.interleave = index, scale, config.rope_interleave
        self.segment_attention: SegmentAttention = segment_attention
        self.rotate = rotate


class Attention(AttentionLayer):
    """Grouped-query attention (arXiv 2305.13245): `softmax(q k^T / sqrt(N)) v`, where H/K query heads share a key head.

    With `use_qk_norm` queries and keys are RMS-normed, each head by itself or all heads together (OLMoE).
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index, scale=config.head_size**-0.5)
        self.head_size = config.head_size
        hidden, size, bias = config.hidden_size, config.head_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=config.attention_out_bias)
        self.norms_heads = config.qk_norm_over == "head"
        queries, keys = (1, 1) if self.norms_heads else (config.num_attention_heads, config.kv_heads)
        self.q_norm = RMSNorm(queries * size, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(keys * size, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(self, x_BSD: Tensor, angles: Angles | None, attend: Attend) -> Tensor:
        q, k, v = self.project(x_BSD, angles)
        return self.o_proj(attend(self, q, k, v).flatten(-2))

    def project(self, x_BSD: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, S, H, N]`, keys and values `[B, S, K, N]`."""
        q, k, v = self.q_proj(x_BSD), self.k_proj(x_BSD), self._heads(self.v_proj(x_BSD))
        if self.norms_heads:
            q, k = self.q_norm(self._heads(q)), self.k_norm(self._heads(k))
        else:
            q, k = self._heads(self.q_norm(q)), self._heads(self.k_norm(k))
        if angles is not None:
            q, k = (self.rotate(x, *angles, self.interleave) for x in (q, k))
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size))


def segment_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """Causal attention of `q [T, H, N]` over `k [T, K, N], v [T, K, M]`, one segment after the other: `[T, H, M]`."""
    sharing = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(sharing, dim=1), v.repeat_interleave(sharing, dim=1)
    pieces = []
    for start, stop in itertools.pairwise(cu_seqlens.tolist()):
        q_1HSN, k_1HSN, v_1HSM = (x[None, start:stop].transpose(1, 2) for x in (q, k, v))
        out_1HSM = F.scaled_dot_product_attention(q_1HSN, k_1HSN, v_1HSM, is_causal=True, scale=scale)
        pieces.append(out_1HSM.transpose(1, 2)[0])
    return torch.cat(pieces)


def segment_positions(cu_seqlens: Tensor, shape: torch.Size, part_of_rows: tuple[int, int] = (0, 1)) -> Tensor:
    """The position of every token in its segment, `[B, S]` int32, where `shape` is `[B, S]`.

    `part_of_rows`: which of how many consecutive parts of its rows these tokens are, where ranks share the rows.
    """
    (rows, positions), (number, parts) = shape, part_of_rows
    in_row_S = torch.arange(number * positions, (number + 1) * positions, dtype=torch.int32, device=cu_seqlens.device)
    row_B1 = torch.arange(rows, dtype=torch.int32, device=cu_seqlens.device)[:, None]
    place_BS = row_B1 * (parts * positions) + in_row_S
    segment_BS = torch.searchsorted(cu_seqlens, place_BS, right=True) - 1
    return place_BS - cu_seqlens[segment_BS]


@dataclass(frozen=True)
class PackedAttention:
    """Causal attention within segments of the flattened tokens, for training and scoring.

    `cu_seqlens [segments + 1]` int32 are the segments' boundaries in `0..B*S`; `max_seqlen` is the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    from_cache: ClassVar[bool] = False

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        rows = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return layer.segment_attention(q, k, v, self.cu_seqlens, self.max_seqlen, layer.scale).unflatten(0, rows)


@dataclass(frozen=True)
class PrefillAttention:
    """Attention over packed prompts `[1, T]`, one segment a cache row, that also fills the cache.

    The caller sets `cache.lengths` once all layers have run.
    """

    cache: KVCache
    lengths: list[int]
    cu_seqlens: Tensor
    from_cache: ClassVar[bool] = False

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        keys, values = (k[0], v[0]) if kept is None else (kept[0], kept[0, ..., : self.cache.latent_size])
        prompts = zip(keys.split(self.lengths), values.split(self.lengths), strict=True)
        for row, (row_keys, row_values) in enumerate(prompts):
            self.cache.keys[layer.index, row, :, : len(row_keys)] = row_keys.transpose(0, 1)
            self.cache.values[layer.index, row, :, : len(row_values)] = row_values.transpose(0, 1)
        return PackedAttention(self.cu_seqlens.to(q.device), max(self.lengths))(layer, q, k, v)


class AppendingAttention:
    """Attention of new tokens `[rows, S]` over each row of `keys` and `values`, which they are appended to.

    k and v are what is stored. Serves one pass through the layers: the caller advances the `lengths` of the rows by S
    once all of them have run. `longest` bounds the lengths; they are all the same if `even`.
    """

    from_cache: ClassVar[bool] = True

    def __init__(
        self, keys: Tensor | ByLayer, values: Tensor | ByLayer, lengths: Tensor, longest: int, even: bool
    ) -> None:
        self.keys, self.values, self.lengths, self.longest, self.even = keys, values, lengths, longest, even
        self._of_new: tuple[tuple[int, torch.device], Tensor, Tensor | None] | None = None

    def __call__(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None = None) -> Tensor:
        keys, values = self.keys[layer.index], self.values[layer.index]
        new, key_heads = q.shape[1], k.shape[2]
        sharing, stop = q.shape[2] // key_heads, self.longest + new
        positions, visible = self._positions(new, sharing, q.device)
        if self.even:  # no index: the places are the same in every row
            keys[:, :, self.longest : stop] = k.transpose(1, 2)
            values[:, :, self.longest : stop] = v.transpose(1, 2)
        else:
            rows = torch.arange(len(q), device=q.device)[:, None]
            keys[rows, :, positions] = k.to(keys.dtype)
            values[rows, :, positions] = v.to(values.dtype)
        # Query heads that share a key head attend as further positions, so that keys are not copied for each of them.
        out = F.scaled_dot_product_attention(
            q.unflatten(2, (key_heads, sharing)).permute(0, 2, 3, 1, 4).flatten(2, 3),
            keys[:, :, :stop].to(q.dtype),
            values[:, :, :stop].to(q.dtype),
            attn_mask=visible,
            scale=layer.scale,
        )
        return out.unflatten(2, (sharing, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _positions(self, new: int, sharing: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions of the new tokens `[rows, S]` and a mask of the places that they see, None for all; once a pass."""
        if self._of_new is None or self._of_new[0] != (new, device):
            positions, visible = self.lengths[:, None].to(device) + torch.arange(new, device=device), None
            if new > 1 or not self.even:
                places = torch.arange(self.longest + new, device=device)
                visible = (places <= positions[:, None, :, None]).repeat(1, 1, sharing, 1)
            self._of_new = ((new, device), positions, visible)
        return self._of_new[1:]


class CachedAttention(AppendingAttention):
    """Attention over the rows of a cache, as far as they are filled."""

    def __init__(self, cache: KVCache) -> None:
        lengths = cache.lengths.tolist()
        longest = max(lengths)
        super().__init__(cache.keys, cache.values, cache.lengths, longest, even=min(lengths) == longest)


class StaticAttention(AppendingAttention):
    """Attention in shapes that do not depend on the lengths: every query reads the whole memory, behind a mask."""

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        super().__init__(keys, values, lengths, longest=keys.shape[3] - 1, even=False)
