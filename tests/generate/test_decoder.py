"""The decoder that refills its rows: whatever comes and goes beside it, a request gets the tokens it gets alone."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence

import pytest
import torch

from moe_lm.common.errors import MoeLmError, UsageError
from moe_lm.generate.decode import Decoder, Settings, Step, generate
from moe_lm.generate.penalties import Text
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.model.attention import CachedAttention
from moe_lm.model.transformer import LanguageModel
from tests.generate.test_decode import BASE, CONFIGS, build, full_logits, full_output

KINDS = {name: CONFIGS[name] for name in ("grouped-query", "latent")}
VARIED = [
    Settings(9),
    Settings(14, Sampling(temperature=1.2, top_p=0.9), seed=5),
    Settings(
        6,
        Sampling(
            temperature=0.8,
            min_p=0.05,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.2,
            no_repeat_ngram=2,
        ),
        seed=77,
        min_new_tokens=4,
    ),
    Settings(11, Sampling(temperature=1.5, typical_p=0.9, logit_bias=((3, 2.0),))),
    Settings(8, Sampling(temperature=0.0, no_repeat_ngram=1), logprobs=2),
]


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return build(request.param)


@torch.inference_mode()
def by_hand(model: LanguageModel, prompt: Sequence[int], settings: Settings, stop_ids: Sequence[int] = ()) -> list[int]:
    """The whole text through the model for every token, without a cache."""
    ids, generator = list(prompt), torch.Generator().manual_seed(settings.seed)
    while len(ids) - len(prompt) < settings.max_new_tokens:
        forbidden = stop_ids if len(ids) - len(prompt) < settings.min_new_tokens else ()
        logits = full_logits(model, ids)[None, -1]
        [token] = settings.sampling(logits, [generator], [Text(ids, len(prompt), forbidden)]).tolist()
        if token in stop_ids:
            break
        ids.append(token)
    return ids[len(prompt) :]


def requests(number: int) -> list[tuple[list[int], Settings]]:
    draw = random.Random(2)
    prompts = [[draw.randrange(97) for _ in range(draw.choice([1, 2, 5, 13, 21]))] for _ in range(number)]
    return [(prompt, VARIED[place % len(VARIED)]) for place, prompt in enumerate(prompts)]


def texts(steps: Sequence[Step]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for step in steps:
        found.setdefault(step.request, []).extend([] if step.token is None else [step.token])
    return found


@pytest.mark.parametrize("prefill_tokens", [4, 16, 2048])
@pytest.mark.parametrize("slots", [1, 3, 20])
def test_cached_batched_and_chunked_equal_uncached(model: LanguageModel, slots: int, prefill_tokens: int) -> None:
    """Mixed prompt lengths, strategies and lengths; prompts over 4 or 16 tokens come in pieces; rows are refilled."""
    asked, stop_ids = requests(12), list(range(0, 97, 11))
    decoder = Decoder(model, slots, capacity=40, prefill_tokens=prefill_tokens)
    for prompt, settings in asked:
        decoder.add(prompt, settings, stop_ids)
    steps = list(decoder.run())
    expected = {place: by_hand(model, *request, stop_ids) for place, request in enumerate(asked)}
    assert texts(steps) == expected
    assert sorted(step.request for step in steps if step.finish) == list(range(12))
    for step in steps:
        if step.finish == "length":
            assert len(expected[step.request]) == asked[step.request][1].max_new_tokens


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
        expected = by_hand(model, *request)
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
        assert found[request] == by_hand(model, prompt, settings)[: 2 if request == place else 8]


def test_a_prompt_that_is_cancelled_while_it_grows_leaves_its_row(model: LanguageModel) -> None:
    decoder = Decoder(model, slots=1, capacity=40, prefill_tokens=4)
    decoder.add([5] * 20, Settings(3))
    decoder.add([7, 8], Settings(5))
    assert decoder.step() == []
    assert decoder.cancel(0)
    assert texts(list(decoder.run())) == {1: by_hand(model, [7, 8], Settings(5))}


def test_a_long_prompt_does_not_stop_what_is_being_written(model: LanguageModel) -> None:
    decoder = Decoder(model, slots=2, capacity=40, prefill_tokens=4)
    decoder.add([7, 8], Settings(20))
    decoder.step()
    decoder.add([5] * 16, Settings(4))
    for _ in range(3):
        assert [step.request for step in decoder.step()] == [0]
    assert [step.request for step in decoder.step()] == [0, 1]


def test_log_probabilities_are_the_models_own(model: LanguageModel) -> None:
    settings = Settings(6, Sampling(temperature=1.3, top_k=5, repetition_penalty=1.5), seed=3, logprobs=3)
    decoder = Decoder(model, 2, 40, vocab_size=90)
    decoder.add([5, 6, 7], settings)
    decoder.add([5, 6], Settings(6))
    ids = [5, 6, 7]
    for step in decoder.run():
        if step.request == 1:
            assert step.logprob is None
            continue
        assert step.token is not None
        log_p = full_logits(model, ids)[-1, :90].log_softmax(-1)
        assert step.logprob == pytest.approx(log_p[step.token].item(), abs=1e-4)
        best = log_p.topk(3)
        assert [token for token, _ in step.alternatives] == best.indices.tolist()
        assert [value for _, value in step.alternatives] == pytest.approx(best.values.tolist(), abs=1e-4)
        ids.append(step.token)
    assert len(ids) == 9


def test_how_texts_end(model: LanguageModel) -> None:
    [free] = generate(model, [[5, 6]], Settings(12))
    stop = free[3]
    before = free.index(stop)
    decoder = Decoder(model, 4, 40)
    decoder.add([5, 6], Settings(12), {stop})
    decoder.add([5, 6], Settings(12, min_new_tokens=12), {stop})
    decoder.add([5, 6], Settings(3))
    banned = Sampling(logit_bias=tuple((token, float("-inf")) for token in range(97)))
    decoder.add([5, 6], Settings(3, banned))
    steps = list(decoder.run())
    finishes = {step.request: (step.finish, step.token is None) for step in steps if step.finish}
    assert finishes == {0: ("stop", True), 1: ("length", False), 2: ("length", False), 3: ("exhausted", True)}
    found = texts(steps)
    assert found[0] == free[:before]
    assert len(found[1]) == 12
    assert stop not in found[1]


def test_more_prompts_than_slots_give_what_each_gives_alone(model: LanguageModel) -> None:
    prompts, settings = [prompt for prompt, _ in requests(10)], Settings(7, Sampling(temperature=1.1), seed=40)
    assert generate(model, prompts, settings, slots=3) == generate(model, prompts, settings, slots=10)


def test_greedy_is_the_default_and_a_cache_is_made_once(model: LanguageModel) -> None:
    decoder = Decoder(model, 2, 40)
    place = decoder.cache.keys.data_ptr()
    for _ in range(5):
        decoder.add([5], Settings(4))
    assert set(map(tuple, texts(list(decoder.run())).values())) == {tuple(by_hand(model, [5], Settings(4, GREEDY)))}
    assert decoder.cache.keys.data_ptr() == place


def test_what_cannot_be_asked_for() -> None:
    decoder = Decoder(build(BASE), 1, 12)
    with pytest.raises(UsageError, match="prompt has 13 tokens, more than the cache's 12 positions"):
        decoder.add([1] * 13, Settings())
    with pytest.raises(UsageError, match="ids from 3 to 97, but the model's vocab_size=97"):
        decoder.add([3, 97], Settings())
    assert not decoder.busy


@pytest.mark.parametrize("prefill_tokens", [4, 2048])
def test_experts_are_those_that_predicted_the_token(prefill_tokens: int) -> None:
    """Layer by layer as the model without a cache routes the last token before it; rows beside it do not ask."""
    model = build(BASE.model_copy(update={"num_hidden_layers": 3}))
    decoder = Decoder(model, 2, 40, prefill_tokens=prefill_tokens)
    texts = [[5, 6, 7, 8, 9, 10, 11], [5, 6], [12]]
    for place, prompt in enumerate(texts):
        decoder.add(prompt, Settings(5 + place, routing=place != 1))
    for step in decoder.run():
        if step.request == 1:
            assert step.experts is None
            continue
        routings = full_output(model, texts[step.request]).routings
        assert step.experts is not None
        assert len(routings) == 2
        assert list(map(set, step.experts)) == [set(routing.experts[-1].tolist()) for routing in routings]
        assert step.token is not None
        texts[step.request].append(step.token)
    assert [len(text) for text in texts] == [12, 2, 8]


@pytest.mark.parametrize("prefill_tokens", [4, 2048])
def test_after_a_step_that_failed_a_cleared_decoder_is_as_new(model: LanguageModel, prefill_tokens: int) -> None:
    """With plain attention over the cache: the native one never reads beyond a row's length, and 0 times NaN is NaN."""
    model = copy.deepcopy(model)
    model.cached_attention = CachedAttention
    settings = Settings(6, Sampling(temperature=0.0, logit_bias=((7, -math.inf),)))
    prompts = [[5, 6], [9] * 20]
    expected = {place: by_hand(model, prompt, settings) for place, prompt in enumerate(prompts, 3)}
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
    assert texts(list(decoder.run())) == expected
