"""The KV cache: keys and values of every layer for the positions that were read, on one device or on several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moe_lm.config.model import ModelConfig


class KVCache:
    """Keys and values of every layer, `[layers, rows, K, capacity, N]`, and how many positions each row holds.

    Latent attention stores one key a position for all heads, which begins with its value: there `values` is a view of
    `keys`. `layers` are the devices of the layers where a model lies on several. `zeros` allocates, like `torch.zeros`.
    """

    keys: Tensor | ByLayer
    values: Tensor | ByLayer

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        layers: Sequence[torch.device] | None = None,
        zeros: Callable[..., Tensor] = torch.zeros,
    ) -> None:
        self.latent_size = config.kv_lora_rank
        if self.latent_size is None:
            heads, size = config.kv_heads, config.head_size
        else:
            heads, size = 1, self.latent_size + config.rotary_size
        shape = (rows, heads, capacity, size)

        def room() -> Tensor | ByLayer:
            if layers is None or len(set(layers)) == 1:
                place = layers[0] if layers else device
                return zeros((config.num_hidden_layers, *shape), dtype=dtype, device=place)
            return ByLayer([zeros(shape, dtype=dtype, device=place) for place in layers])

        self.keys = room()
        self.values = room() if self.latent_size is None else self.keys[..., : self.latent_size]
        self.lengths = torch.zeros(rows, device=device, dtype=torch.long)

    def view(self, start: int, stop: int) -> KVCache:
        """Only these rows, in the same memory, lengths included."""
        part = copy.copy(self)
        part.keys, part.values = self.keys[:, start:stop], self.values[:, start:stop]
        part.lengths = self.lengths[start:stop]
        return part

    def move_row(self, source: int, target: int) -> None:
        """Copy one row over another."""
        if source == target:
            return
        length = int(self.lengths[source])
        for kept in self._memory():
            kept[:, target, :, :length] = kept[:, source, :, :length]
        self.lengths[target] = length

    def take_rows(self, places: Tensor) -> None:
        """Replace row i with row `places[i]`, for as many rows as there are places; the others stay."""
        changed = (places != torch.arange(len(places), device=places.device)).nonzero()[:, 0]
        if not len(changed):
            return
        sources = places[changed]
        longest = int(self.lengths[sources].max())
        for kept in self._memory():
            kept[:, changed, :, :longest] = kept[:, sources, :, :longest]
        self.lengths[changed] = self.lengths[sources]

    def _memory(self) -> list[Tensor | ByLayer]:
        """The tensors that do not lie within another one."""
        return [self.keys, self.values] if self.latent_size is None else [self.keys]


class ByLayer:
    """A tensor `[layers, ...]` whose layers lie on several devices; an index over all layers gives another."""

    def __init__(self, layers: list[Tensor]) -> None:
        self._layers = layers
        self.dtype = layers[0].dtype

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return self._layers[index]
        return ByLayer([layer[self._within(layer, index)] for layer in self._layers])

    def __setitem__(self, index: tuple[Any, ...], value: Any) -> None:
        if isinstance(index[0], int):
            self._layers[index[0]][index[1:]] = value
            return
        for layer, new in zip(self._layers, value._layers, strict=True):
            layer[self._within(layer, index)] = new

    def _within(self, layer: Tensor, index: tuple[Any, ...]) -> tuple[Any, ...]:
        rest = index if index[0] is Ellipsis else index[1:]
        return tuple(part.to(layer.device) if isinstance(part, Tensor) else part for part in rest)
