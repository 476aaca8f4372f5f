"""A model's passes over a KV cache: prompts fill it packed, then every pass appends tokens to its rows.

Shapes: R rows of the cache, S new tokens a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_lm.common.errors import UsageError
from moe_lm.config.model import ModelConfig
from moe_lm.kernels import huge_pages
from moe_lm.model.attention import PrefillAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.moe import Routing
from moe_lm.model.transformer import LanguageModel


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], cache: KVCache) -> Ahead:
    """Fill the empty rows of the cache with the prompts, packed into one sequence."""
    lengths = [len(prompt) for prompt in prompts]
    device = cache.lengths.device
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    input_ids = torch.cat([torch.tensor(prompt) for prompt in prompts]).to(device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(device)
    attend = PrefillAttention(cache, lengths, ends.int())
    hidden_1TD, routings = model.model(input_ids[None], position_ids[None], attend)
    cache.lengths += ends.diff()
    last_R = ends[1:] - 1
    return Ahead(model.lm_head(hidden_1TD[0].to(device)[last_R]), routings, last_R)


def extend(model: LanguageModel, cache: KVCache, tokens: Sequence[Sequence[int]]) -> Ahead:
    """Append S tokens to every row of the cache."""
    input_ids_RS = torch.tensor(tokens, device=cache.lengths.device)
    new = input_ids_RS.shape[1]
    positions_RS = cache.lengths[:, None] + torch.arange(new, device=input_ids_RS.device)
    hidden_RSD, routings = model.model(input_ids_RS, positions_RS, model.cached_attention(cache))
    cache.lengths += new
    return Ahead(model.lm_head(hidden_RSD[:, -1]), routings, slice(new - 1, None, new))


class Ahead(NamedTuple):
    """The logits of the token after each row, and how every MoE layer routed the tokens of the pass."""

    logits: Tensor  # [R, V]
    routings: list[Routing]
    last: Tensor | slice  # the index of each row's last token in the pass

    def of_last(self, x: Tensor) -> Tensor:
        """Values of the pass's tokens `[tokens, ...]` -> those of each row's last token `[R, ...]`."""
        return x[self.last.to(x.device) if isinstance(self.last, Tensor) else self.last]


def experts_by_row(ahead: Sequence[Ahead]) -> list[tuple[tuple[int, ...], ...]]:
    """The experts of each row's last token, by MoE layer, the one with the largest weight first."""
    layers = []
    for layer in range(len(ahead[0].routings)):
        experts_Rk = torch.cat([part.of_last(part.routings[layer].experts) for part in ahead])
        weights_Rk = torch.cat([part.of_last(part.routings[layer].weights) for part in ahead])
        layers.append(experts_Rk.gather(-1, weights_Rk.argsort(-1, descending=True)).tolist())
    rows = range(sum(len(part.logits) for part in ahead))
    return [tuple(tuple(experts_Rk[row]) for experts_Rk in layers) for row in rows]


@torch.inference_mode()
def cache_for(model: LanguageModel, rows: int, capacity: int) -> KVCache:
    """An empty cache on the devices of the model's layers."""
    layers = None if model.layer_devices is None else model.layer_devices.layers
    return KVCache(model.config, rows, capacity, model.device, model.lm_head.weight.dtype, layers, huge_pages.zeros)


def capacity_for(config: ModelConfig, lengths: Iterable[int], new_tokens: int) -> int:
    """The number of positions that a cache needs for prompts of these lengths."""
    return min(config.max_position_embeddings, max(lengths, default=1) + new_tokens - 1)


def room(config: ModelConfig, prompt: Sequence[int]) -> int:
    """The number of tokens that can follow a prompt, below 1 when it is too long. The last one needs no position."""
    return config.max_position_embeddings - len(prompt) + 1


def check_prompt(config: ModelConfig, prompt: Sequence[int], capacity: int) -> None:
    """Raise UsageError for a prompt that is empty, longer than `capacity`, or has ids outside the vocabulary."""
    if not prompt:
        raise UsageError("a prompt has no token to start from; begin it with the tokenizer's bos")
    if len(prompt) > capacity:
        whole = capacity == config.max_position_embeddings
        limit = f"model's max_position_embeddings={capacity}" if whole else f"cache's {capacity} positions"
        raise UsageError(f"the prompt has {len(prompt)} tokens, more than the {limit}; shorten it")
    if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
        raise UsageError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}, but the model's vocab_size={config.vocab_size}; "
            "use the tokenizer that it was trained with"
        )
