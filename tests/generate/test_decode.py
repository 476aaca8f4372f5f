"""The decoder that refills its rows: whatever comes and goes beside it, a request gets the tokens it gets alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.generate.decode import Decoder, Settings, generate
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.kernels import kernels
from moe_lm.model.transformer import LanguageModel
from tests.generate.test_cached import requests
from tests.generate.uncached import POSITIONS, VOCABULARY, build, texts, uncached

PROMPTS = [[5], [7, 11, 13, 17, 19, 23, 29], [2, 3, 5], [31] * 12]


@pytest.fixture(scope="module", params=["grouped-query", "latent"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = build(request.param)
    kernels.apply(model, kernels.choose(model.device, decoding=True))
    return model


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.2, top_k=50, top_p=0.95)], ids=["greedy", "drawn"])
def test_row_i_of_a_batch_draws_with_seed_plus_i(model: LanguageModel, sampling: Sampling) -> None:
    found = generate(model, PROMPTS, Settings(20, sampling, seed=11))
    alone = [Settings(20, sampling, seed=seed) for seed in range(11, 15)]
    assert found == [uncached(model, prompt, settings) for prompt, settings in zip(PROMPTS, alone, strict=True)]
    assert len(set(map(tuple, found))) == len(PROMPTS)


def test_rows_end_when_no_position_is_left(model: LanguageModel) -> None:
    prompts = [[1] * 40, [2] * 37, [3]]
    found = generate(model, prompts, Settings(1000))
    assert [len(text) for text in found] == [1, 4, 40]
    assert found == [generate(model, [prompt], Settings(1000))[0] for prompt in prompts]


def test_requests_that_come_late_or_are_cancelled_change_nothing_for_the_others(model: LanguageModel) -> None:
    asked = requests(9)
    decoder, steps = Decoder(model, slots=3, capacity=40, prefill_tokens=8), []
    for place, (prompt, settings) in enumerate(asked):
        assert decoder.add(prompt, settings) == place
        steps += decoder.step()
        if place == 4:
            assert decoder.cancel(2)
        if place == 8:
            assert decoder.cancel(8)  # still waiting
    steps += decoder.run()
    assert not decoder.busy
    assert not decoder.cancel(2)
    assert not decoder.cancel(0)
    found = texts(steps)
    assert 8 not in found
    for place, request in enumerate(asked[:8]):
        expected = uncached(model, *request)
        assert expected[: len(found[place])] == found[place]
        assert place == 2 or found[place] == expected


@pytest.mark.parametrize("place", range(3))
def test_any_row_can_be_cancelled(model: LanguageModel, place: int) -> None:
    decoder, settings = Decoder(model, slots=3, capacity=40), Settings(8)
    prompts = [[5, 6], [7, 8, 9, 10], [11]]
    for prompt in prompts:
        decoder.add(prompt, settings)
    steps = decoder.step() + decoder.step()
    assert decoder.cancel(place)
    found = texts([*steps, *decoder.run()])
    for request, prompt in enumerate(prompts):
        assert found[request] == uncached(model, prompt, settings)[: 2 if request == place else 8]


def test_a_prompt_that_is_cancelled_while_it_grows_leaves_its_row(model: LanguageModel) -> None:
    decoder = Decoder(model, slots=1, capacity=40, prefill_tokens=4)
    decoder.add([5] * 20, Settings(3))
    decoder.add([7, 8], Settings(5))
    assert decoder.step() == []
    assert decoder.cancel(0)
    assert texts(decoder.run()) == {1: uncached(model, [7, 8], Settings(5))}


def test_a_long_prompt_does_not_stop_what_is_being_written(model: LanguageModel) -> None:
    decoder = Decoder(model, slots=2, capacity=40, prefill_tokens=4)
    decoder.add([7, 8], Settings(20))
    decoder.step()
    decoder.add([5] * 16, Settings(4))
    for _ in range(3):
        assert [step.request for step in decoder.step()] == [0]
    for _ in range(4):
        assert [step.request for step in decoder.step()] == [0, 1]
    assert [step.request for step in decoder.step()] == [0]


def test_how_texts_end(model: LanguageModel) -> None:
    [free] = generate(model, [[5, 6]], Settings(12))
    stop = free[3]
    before = free.index(stop)
    decoder = Decoder(model, 4, 40)
    decoder.add([5, 6], Settings(12), {stop})
    decoder.add([5, 6], Settings(12, min_new_tokens=12), {stop})
    decoder.add([5, 6], Settings(3))
    banned = Sampling(logit_bias=tuple((token, float("-inf")) for token in range(VOCABULARY)))
    decoder.add([5, 6], Settings(3, banned))
    steps = list(decoder.run())
    finishes = {step.request: (step.finish, step.token is None) for step in steps if step.finish}
    assert finishes == {0: ("stop", True), 1: ("length", False), 2: ("length", False), 3: ("exhausted", True)}
    found = texts(steps)
    assert found[0] == free[:before]
    assert len(found[1]) == 12
    assert stop not in found[1]


def test_greedy_is_the_default_and_a_cache_is_made_once(model: LanguageModel) -> None:
    decoder = Decoder(model, 2, 40)
    place = decoder.cache.keys.data_ptr()
    for _ in range(5):
        decoder.add([5], Settings(4))
    assert set(map(tuple, texts(decoder.run()).values())) == {tuple(uncached(model, [5], Settings(4, GREEDY)))}
    assert decoder.cache.keys.data_ptr() == place


def test_ids_beyond_the_tokenizer_are_never_chosen(model: LanguageModel) -> None:
    settings = Settings(30, Sampling(temperature=5.0), seed=1)
    assert max(generate(model, [[5]], settings)[0]) >= 50
    assert max(generate(model, [[5]], settings, vocab_size=50)[0]) < 50


def test_no_prompts_give_no_texts(model: LanguageModel) -> None:
    assert generate(model, [], Settings()) == []


@pytest.mark.parametrize(
    ("prompt", "capacity", "said"),
    [
        ([1] * 41, POSITIONS, "prompt has 41 tokens, more than the model's max_position_embeddings=40"),
        ([1] * 13, 12, "prompt has 13 tokens, more than the cache's 12 positions"),
        ([3, 97], 12, "ids from 3 to 97, but the model's vocab_size=97"),
        ([], 12, "begin it with the tokenizer's bos"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(prompt: list[int], capacity: int, said: str) -> None:
    decoder = Decoder(build(), 1, capacity)
    with pytest.raises(UsageError, match=said):
        decoder.add(prompt, Settings())
    assert not decoder.busy


@pytest.mark.parametrize("prefill_tokens", [4, 2048])
@pytest.mark.parametrize("kind", ["grouped-query", "latent"])
def test_after_a_step_that_failed_a_cleared_decoder_is_as_new(kind: str, prefill_tokens: int) -> None:
    """In plain kernels: the C++ never reads beyond a row's length, and 0 times NaN is NaN."""
    model = build(kind)
    settings = Settings(6, Sampling(temperature=0.0, logit_bias=((7, -math.inf),)))
    prompts = [[5, 6], [9] * 20]
    expected = {place: uncached(model, prompt, settings) for place, prompt in enumerate(prompts, 3)}
    decoder = Decoder(model, 2, 40, prefill_tokens=prefill_tokens)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = math.nan
    decoder.model = broken
    for prompt in ([7] * 20, [7] * 19, [7] * 30):
        decoder.add(prompt, Settings(9))
    with pytest.raises(MoeLmError, match="not numbers"):
        list(decoder.run())
    decoder.clear()
    assert not decoder.busy
    for prompt in prompts:
        decoder.add(prompt, settings)
    assert texts(decoder.run()) == expected
