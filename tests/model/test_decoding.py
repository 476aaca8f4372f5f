"""Cached against uncached decoding: packed prompts of unequal length fill the cache, then one token a row reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_lm.model.attention import PrefillAttention
from moe_lm.model.kv_cache import KVCache
from moe_lm.model.transformer import LanguageModel
from tests.tiny import LATENT, packed, tiny_model

VOCABULARY = 64
PROMPTS = [5, 1, 11, 8]
DENSE: dict[str, Any] = {"num_key_value_heads": None, "n_routed_experts": 0, "first_k_dense_replace": 0}
MOE = {"n_routed_experts": 8}
KINDS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1, "use_qk_norm": False},
    "moe": {**MOE, "num_key_value_heads": 2, "first_k_dense_replace": 1},
    "latent": {**LATENT, "q_lora_rank": None},
    "latent_moe": {
        **LATENT, **MOE, "v_head_dim": 24, "rope_interleave": True, "attention_bias": True,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8, "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
    "partly_rotated": {"partial_rotary_factor": 0.5, "qk_norm_over": "projection"},
    "learned_positions": {"position_embedding": "learned", "norm_type": "layernorm", "attention_bias": True},
    "sinusoidal_positions": {"position_embedding": "sinusoidal"},
}  # fmt: skip


def build(**changes: Any) -> LanguageModel:
    return tiny_model(0, **DENSE | changes)


def random_prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in PROMPTS]


def empty_cache(model: LanguageModel, rows: int, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(model.config, rows, 32, torch.device("cpu"), dtype)


def uncached(model: LanguageModel, tokens: Tensor) -> Tensor:
    """Logits `[S, V]` of one sequence, computed anew."""
    return model(tokens[None], *packed([len(tokens)])).logits[0]


def prefill(model: LanguageModel, prompts: list[Tensor], cache: KVCache) -> list[Tensor]:
    """Logits of every prompt, which the cache keeps."""
    lengths = [len(prompt) for prompt in prompts]
    positions, attend = packed(lengths)
    logits = model(torch.cat(prompts)[None], positions, PrefillAttention(cache, lengths, attend.cu_seqlens)).logits[0]
    cache.lengths = torch.tensor(lengths)
    return list(logits.split(lengths))


def extend(model: LanguageModel, tokens: Tensor, cache: KVCache) -> Tensor:
    """Logits `[rows, S, V]` of new tokens `[rows, S]`, appended to each row of the cache."""
    positions = cache.lengths[:, None] + torch.arange(tokens.shape[1])
    logits = model(tokens, positions, model.cached_attention(cache)).logits
    cache.lengths = cache.lengths + tokens.shape[1]
    return logits


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_cached_decoding_equals_uncached(kind: str) -> None:
    """Logits of every step within 1e-5 and the same greedy tokens, for prompts of unequal length in one batch."""
    model, rows = build(**KINDS[kind]), random_prompts()
    cache = empty_cache(model, len(rows))
    last = torch.stack([logits[-1] for logits in prefill(model, rows, cache)])
    for _ in range(10):
        expected = torch.stack([uncached(model, row)[-1] for row in rows])
        torch.testing.assert_close(last, expected, rtol=0, atol=1e-5)
        chosen = last.argmax(-1)
        assert torch.equal(chosen, expected.argmax(-1))
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, chosen, strict=True)]
        last = extend(model, chosen[:, None], cache)[:, 0]


def prefilled(model: LanguageModel, dtype: torch.dtype = torch.float32, garbage: float = 0.0) -> KVCache:
    """A cache of the random prompts, one a row; free places hold `garbage`."""
    cache = empty_cache(model, len(PROMPTS), dtype)
    cache.keys.fill_(garbage)
    cache.values.fill_(garbage)
    prefill(model, random_prompts(), cache)
    return cache


def next_tokens(number: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (len(PROMPTS), number), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["multi_head", "moe", "latent_moe"])
def test_prefilled_prompts_equal_each_prompt_alone(kind: str) -> None:
    model, prompts = build(**KINDS[kind]), random_prompts()
    for logits, prompt in zip(prefill(model, prompts, empty_cache(model, len(prompts))), prompts, strict=True):
        torch.testing.assert_close(logits, uncached(model, prompt), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped_query", "moe", "latent", "latent_moe"])
def test_several_new_tokens_at_once_see_each_other_causally(kind: str) -> None:
    """A second turn of a conversation: a block of tokens appended to rows of unequal length."""
    model, turns = build(**KINDS[kind]), next_tokens(6)
    logits = extend(model, turns, prefilled(model))
    for row, prompt in enumerate(random_prompts()):
        expected = uncached(model, torch.cat((prompt, turns[row])))[len(prompt) :]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped_query", "latent"])
def test_places_behind_a_rows_length_are_never_read(kind: str) -> None:
    """Free places hold garbage after a shorter sequence took a longer one's row."""
    model = build(**KINDS[kind])
    clean, dirty = (extend(model, next_tokens(), prefilled(model, garbage=garbage)) for garbage in (0.0, 1e3))
    assert torch.equal(clean, dirty)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moe", "latent"])
def test_a_bfloat16_cache_is_near_a_float32_one(kind: str) -> None:
    model = build(**KINDS[kind])
    wide, narrow = (extend(model, next_tokens(), prefilled(model, t)) for t in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["moe", "latent"])
def test_cached_decoding_under_bfloat16_autocast_is_near_float32(kind: str) -> None:
    model = build(**KINDS[kind])
    expected = extend(model, next_tokens(), prefilled(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = extend(model, next_tokens(), prefilled(model, torch.bfloat16))
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.2)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped_query", "latent"])
@pytest.mark.parametrize("places", [[3, 1], [0, 0, 0, 0], [2, 0, 3, 3], [1, 2, 0, 3]])
def test_rows_that_are_taken_go_on_as_before(kind: str, places: list[int]) -> None:
    model, token = build(**KINDS[kind]), next_tokens()
    every, some = prefilled(model), prefilled(model)
    some.take_rows(torch.tensor(places))
    some = some.view(0, len(places))
    for _ in range(2):
        expected, found = extend(model, token, every)[places], extend(model, token[places], some)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["grouped_query", "latent"])
def test_a_moved_row_goes_on_as_before_and_a_view_shares_memory(kind: str) -> None:
    model, token = build(**KINDS[kind]), torch.tensor([[3]])
    cache = prefilled(model)
    expected = uncached(model, torch.cat((random_prompts()[2], token[0])))[-1]
    cache.move_row(2, 0)
    part = cache.view(0, 1)
    torch.testing.assert_close(extend(model, token, part)[0, 0], expected, rtol=0, atol=1e-5)
    assert torch.equal(cache.keys[:, 0], part.keys[:, 0])
    assert part.keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()


def test_a_latent_cache_holds_rank_plus_rotated_part_a_position() -> None:
    cache = empty_cache(build(**KINDS["latent"]), rows=2)
    assert cache.keys.shape == (3, 2, 1, 32, 16 + 8)
    assert cache.values.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()
