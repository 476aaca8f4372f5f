"""/v1/completions against what `moe-lm sample` writes."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from moe_lm.generate.decode import Settings, generate
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.tools.serve.requests import read_bias_object
from tests.texts import text_of
from tests.tools.serve.conftest import MODEL, Served

PROMPTS = ["import os", "", "x"]


def test_same_seed_same_text_as_sample(served: Served, session: Session) -> None:
    settings = Settings(20, Sampling(temperature=0.9, top_p=0.95), seed=7)
    answer = served.complete(prompt="import os", max_tokens=20, temperature=0.9, top_p=0.95, seed=7)
    assert answer.choices[0].text == text_of(session.complete("import os", settings))
    assert answer.object == "text_completion"
    assert answer.model == MODEL


def test_greedy_and_finish_reason_and_usage(served: Served, session: Session) -> None:
    prompt = session.prompt_ids("import os", 12)
    [ids] = generate(session.model, [prompt], Settings(12, GREEDY), session.tokenizer.stop_ids, 1024)
    answer = served.complete(prompt="import os", max_tokens=12, temperature=0)
    assert answer.choices[0].text == session.tokenizer.decode(ids).removesuffix("\ufffd")
    assert answer.choices[0].finish_reason == ("length" if len(ids) == 12 else "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(ids))
    assert answer.usage.total_tokens == len(prompt) + len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_times_n_draw_with_seeds_in_order(served: Served, session: Session, stream: bool) -> None:
    """More texts than rows; text j of prompt i draws with seed + i * n + j."""
    asked = {"prompt": PROMPTS, "n": 3, "max_tokens": 9, "seed": 40}
    if stream:
        texts = [""] * 9
        for chunk in served.complete(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        answer = served.complete(**asked)
        assert [choice.index for choice in answer.choices] == list(range(9))
        texts = [choice.text for choice in answer.choices]
    for index, text in enumerate(texts):
        expected = session.complete(PROMPTS[index // 3], Settings(9, Sampling(temperature=1.0), seed=40 + index))
        assert text == text_of(expected)


def test_ids_are_taken_as_they_are(served: Served, session: Session) -> None:
    ids = [[5, 6, 7], session.prompt_ids("import os", 8)]
    answer = served.complete(prompt=ids, max_tokens=8, temperature=0)
    texts = generate(session.model, ids, Settings(8, GREEDY), session.tokenizer.stop_ids, 1024)
    assert [choice.text for choice in answer.choices] == [session.tokenizer.decode(text) for text in texts]
    alone = served.complete(prompt=ids[0], max_tokens=8, temperature=0)
    assert alone.choices[0].text == answer.choices[0].text


def test_penalties_bias_and_our_own_fields_reach_the_decoder(served: Served, session: Session) -> None:
    sampling = Sampling(
        temperature=1.3, top_k=40, min_p=0.01, typical_p=0.97, no_repeat_ngram=3, repetition_penalty=1.4,
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias=((70, 3.0), (80, -100.0)),
    )  # fmt: skip
    settings = Settings(24, sampling, seed=3)
    own = {"top_k": 40, "min_p": 0.01, "typical_p": 0.97, "repetition_penalty": 1.4, "no_repeat_ngram": 3}
    answer = served.complete(
        prompt="def", max_tokens=24, temperature=1.3, seed=3, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={"70": 3, "80": -100}, extra_body=own,
    )  # fmt: skip
    assert answer.choices[0].text == text_of(session.complete("def", settings))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_before_them(served: Served, session: Session, stream: bool) -> None:
    whole = text_of(session.complete("import os", Settings(30, Sampling(temperature=1.0), seed=1)))
    stop = whole[10:13]
    expected = whole[: whole.index(stop)]
    asked = {"prompt": "import os", "max_tokens": 30, "seed": 1, "stop": ["never there", stop]}
    if stream:
        chunks = list(served.complete(**asked, stream=True))
        text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = served.complete(**asked).choices[0]
        text, finish = choice.text, choice.finish_reason
    assert (text, finish) == (expected, "stop")
    assert served.complete(**asked | {"stop": stop}).choices[0].text == expected
    served.wait(lambda: served.scheduler.running == 0)


def test_log_probabilities_are_the_decoders(served: Served, session: Session) -> None:
    decoder = session.decoder(1, 64)
    decoder.add(session.prompt_ids("import os", 6), Settings(6, seed=2, logprobs=2))
    steps = list(decoder.run())
    answer = served.complete(prompt="import os", max_tokens=6, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-5)
    assert found.tokens == [
        session.tokenizer.decode([step.token], skip_special=False) for step in steps if step.token is not None
    ]
    for best, step in zip(found.top_logprobs or [], steps, strict=True):
        for token, logprob in step.alternatives:
            assert best[session.tokenizer.decode([token], skip_special=False)] >= logprob - 1e-5
    offsets = found.text_offset or []
    assert offsets[0] == 0
    assert offsets == sorted(offsets)


def test_echo_says_the_prompt_first(served: Served, session: Session) -> None:
    text = text_of(session.complete("import os", Settings(5, GREEDY)))
    asked = {"prompt": "import os", "max_tokens": 5, "temperature": 0, "echo": True}
    assert served.complete(**asked).choices[0].text == "import os" + text
    chunks = served.complete(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "import os" + text
    ids = session.tokenizer.encode("import os")
    asked["prompt"] = [session.tokenizer.bos_id, *ids]
    assert served.complete(**asked).choices[0].text == "import os" + text


def test_usage_comes_last_in_a_stream_that_asks(served: Served) -> None:
    asked = {"prompt": ["import os", "x"], "max_tokens": 5, "seed": 4}
    whole = served.complete(**asked).usage
    chunks = list(served.complete(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_routing_names_the_experts_of_every_token(served: Served, session: Session, stream: bool) -> None:
    decoder = session.decoder(1, 64)
    decoder.add(session.prompt_ids("import os", 6), Settings(6, routing=True))
    expected = [[list(layer) for layer in step.experts or ()] for step in decoder.run()]
    body: dict[str, Any] = {"prompt": "import os", "max_tokens": 6, "temperature": 0}
    if stream:
        chunks = served.complete(**body, stream=True, extra_body={"routing": True})
        found = [token for chunk in chunks for token in chunk.choices[0].model_extra["routing"]]
    else:
        found = served.post("completions", **body, routing=True).json()["choices"][0]["routing"]
    assert found == expected
    assert "routing" not in served.post("completions", **body, routing=False).json()["choices"][0]


def test_a_bias_is_any_finite_number() -> None:
    largest = sys.float_info.max
    assert read_bias_object({"5": largest, "6": -largest, "7": 10**308}) == ((5, largest), (6, -largest), (7, 1e308))
    for bias in (math.inf, -math.inf, math.nan, 10**400):
        with pytest.raises(ValueError, match="is not a number to add to the logit of token 5"):
            read_bias_object({"5": bias})


def test_a_text_ends_where_the_context_does(served: Served, session: Session) -> None:
    ids = [5] * (served.scheduler.capacity - 3)
    bias = {str(i): -100 for i in session.tokenizer.stop_ids}
    answer = served.complete(prompt=ids, max_tokens=50, temperature=0, logit_bias=bias)
    assert answer.choices[0].finish_reason == "length"
