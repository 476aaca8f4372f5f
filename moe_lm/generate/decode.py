"""Token ids in, token ids out: the prompts fill a KV cache packed, then every step adds a token to each unfinished row.

A row's tokens depend on its prompt, its place and the seed alone, not on the rows beside it.
Shapes: R rows that are not finished, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_lm.errors import UsageError
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.attention import CachedAttention, KVCache, PrefillAttention
from moe_lm.model.transformer import LanguageModel
from moe_lm.model_config import ModelConfig


@dataclass(frozen=True)
class Settings:
    """How long to go on and how tokens are chosen; row i of a batch draws with `seed + i`."""

    max_new_tokens: int = 200
    sampling: Sampling = GREEDY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens={self.max_new_tokens} asks for no token; give at least 1")
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed={self.seed} is out of range; give a number from 0 to 2**32 - 1")


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> list[list[int]]:
    """The continuation of every prompt; see `stream`."""
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in stream(model, prompts, settings, stop_ids, vocab_size):
        texts[row].append(token)
    return texts


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Pairs (row, token) as they are chosen, step by step.

    A row ends before a token of `stop_ids`, after `max_new_tokens`, or when the model has no position left.
    Only ids below `vocab_size` are chosen: a model may have more than its tokenizer has tokens for. Raises, before
    the first token, UsageError for a prompt that is empty or too long.
    """
    if not prompts:
        return iter(())
    for prompt in prompts:
        _check_prompt(model.config, prompt)
    rooms = [min(settings.max_new_tokens, room(model.config, prompt)) for prompt in prompts]
    return _stream(model, prompts, rooms, settings, frozenset(stop_ids), vocab_size)


def room(config: ModelConfig, prompt: Sequence[int]) -> int:
    """Tokens that can follow a prompt, the last of which needs no position; below 1 when the prompt is too long."""
    return config.max_position_embeddings - len(prompt) + 1


def _check_prompt(config: ModelConfig, prompt: Sequence[int]) -> None:
    if not prompt:
        raise UsageError("a prompt has no token to start from; begin it with the tokenizer's bos")
    if room(config, prompt) < 1:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, more than the model's max_position_embeddings="
            f"{config.max_position_embeddings}; shorten it"
        )


@torch.inference_mode()
def _stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    rooms: list[int],
    settings: Settings,
    stop_ids: frozenset[int],
    vocab_size: int | None,
) -> Iterator[tuple[int, int]]:
    generators = [torch.Generator().manual_seed(settings.seed + row) for row in range(len(prompts))]
    capacity = max(len(prompt) + left - 1 for prompt, left in zip(prompts, rooms, strict=True))
    cache, logits_RV = prefill(model, prompts, capacity)
    rows = list(range(len(prompts)))  # the row of `prompts` at each place of the cache
    while rows:
        chosen = settings.sampling(logits_RV[:, :vocab_size], [generators[row] for row in rows]).tolist()
        going_on = []
        for place, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            if token in stop_ids:
                continue
            yield row, token
            rooms[row] -= 1
            if rooms[row]:
                going_on.append(place)
        if len(going_on) < len(rows):
            cache.keep_rows(going_on)
            rows = [rows[place] for place in going_on]
        if rows:
            logits_RV = decode_one(model, cache, [chosen[place] for place in going_on])


def prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], capacity: int) -> tuple[KVCache, Tensor]:
    """A cache with room for `capacity` positions a row that holds the prompts, and the logits `[R, V]` after them."""
    weight = model.lm_head.weight
    lengths = [len(prompt) for prompt in prompts]
    ends = torch.tensor([0, *lengths], device=weight.device).cumsum(0)
    cache = KVCache(model.config, len(prompts), capacity, weight.device, weight.dtype)
    input_ids = torch.cat([torch.tensor(prompt) for prompt in prompts]).to(weight.device)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).to(weight.device)
    attend = PrefillAttention(cache, lengths, ends.int())
    hidden_1TD, _ = model.model(input_ids[None], position_ids[None], attend)
    cache.lengths += ends.diff()
    return cache, model.lm_head(hidden_1TD[0, ends[1:] - 1])


def decode_one(model: LanguageModel, cache: KVCache, tokens: Sequence[int]) -> Tensor:
    """Append one token to every row of the cache; the logits `[R, V]` after it."""
    input_ids_R1 = torch.tensor(tokens, device=cache.lengths.device)[:, None]
    hidden_R1D, _ = model.model(input_ids_R1, cache.lengths[:, None], CachedAttention(cache))
    cache.lengths += 1
    return model.lm_head(hidden_R1D[:, 0])
