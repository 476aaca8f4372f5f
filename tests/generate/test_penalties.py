"""What a text does to the logits of its next token: against brute force and against transformers' processors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from moe_lm.config.generation import SamplingConfig
from moe_lm.generate.penalties import Text, penalised, repeating
from moe_lm.generate.strategies import GREEDY, Sampling

V = 12
ids_lists = st.lists(st.integers(0, V - 1), max_size=30)
logits_lists = st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V)


def changed(penalties: SamplingConfig, logits: list[float], text: Text) -> list[float]:
    return penalised(torch.tensor([logits], dtype=torch.float64), penalties, [text])[0].tolist()


@given(logits_lists, ids_lists, st.integers(0, 30), st.floats(0.5, 3), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_are_what_a_loop_over_the_vocabulary_gives(
    logits: list[float], ids: list[int], prompt: int, repetition: float, presence: float, frequency: float
) -> None:
    bias = ((0, 1.5), (3, -math.inf))
    penalties = SamplingConfig(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    found = changed(penalties, logits, Text(ids, prompt, {5}))
    for token in range(V):
        value = logits[token] + dict(bias).get(token, 0.0)
        if token in ids:
            value = value * repetition if value < 0 else value / repetition
        written = ids[prompt:].count(token)
        value -= presence * (written > 0) + frequency * written
        assert found[token] == (-math.inf if token == 5 else pytest.approx(value))


@given(ids_lists, st.integers(1, 5))
def test_no_ngram_comes_twice(ids: list[int], size: int) -> None:
    def ngrams(tokens: list[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]

    there = set(ngrams(ids))
    would_repeat = {token for token in range(V) if set(ngrams([*ids, token])[-1:]) & there}
    assert repeating(ids, size) == would_repeat


@pytest.mark.parametrize(
    ("processor", "value", "penalties"),
    [
        *[("RepetitionPenalty", value, SamplingConfig(repetition_penalty=value)) for value in (1.7, 0.6)],
        *[("NoRepeatNGram", value, SamplingConfig(no_repeat_ngram=value)) for value in (1, 2, 3)],
        ("SequenceBias", {(1,): 2.5, (4,): -math.inf}, SamplingConfig(logit_bias=((1, 2.5), (4, -math.inf)))),
    ],
)
def test_the_same_as_transformers(processor: str, value: Any, penalties: SamplingConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, V, generator=generator, dtype=torch.float64) * 5
    ids = torch.randint(V, (50, 9), generator=generator)
    expected = getattr(logits_process, f"{processor}LogitsProcessor")(value)(ids, logits.clone())
    before = logits.clone()
    found = penalised(logits, penalties, [Text(row, 4) for row in ids.tolist()])
    torch.testing.assert_close(found, expected)
    assert torch.equal(logits, before)
    assert not torch.equal(expected, logits)


def test_ids_beyond_the_vocabulary_are_passed_over() -> None:
    logits = torch.zeros(1, 4)
    penalties = SamplingConfig(
        repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0, no_repeat_ngram=1, logit_bias=((9, 3.0),)
    )
    assert torch.equal(penalised(logits, penalties, [Text([7, 9], 0, {11})]), logits)


def test_a_row_that_no_token_is_left_for_gets_minus_1() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(2)]

    texts = [Text([0, 1, 2]), Text([0, 2])]
    for temperature in (0.0, 1.0):
        chosen = Sampling(temperature=temperature, no_repeat_ngram=1)(torch.zeros(2, 3), generators(), texts)
        assert chosen.tolist() == [-1, 1]
    assert GREEDY(torch.zeros(2, 2), generators(), [Text((), 0, {0}), Text((), 0, {0, 1})]).tolist() == [1, -1]


def test_rows_are_changed_by_their_own_texts() -> None:
    logits = torch.ones(3, V)
    penalties = SamplingConfig(repetition_penalty=2.0, presence_penalty=0.5, no_repeat_ngram=2)
    texts = [Text([1, 2, 1]), Text([]), Text([3, 3], 1)]
    alone: Tensor = torch.cat([penalised(logits[:1], penalties, [text]) for text in texts])
    assert torch.equal(penalised(logits, penalties, texts), alone)
