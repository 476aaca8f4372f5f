"""/v1/chat/completions through the official client."""

from __future__ import annotations

from typing import Any

import pytest

from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import GREEDY, Sampling
from moe_lm.tokenizer.tokenizer import Tokenizer
from tests.texts import text_of
from tests.tools.serve.conftest import Serve, Served

TALK: list[Any] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is an import?"},
    {"role": "assistant", "content": "a statement"},
    {"role": "user", "content": "and a class?"},
]


def test_the_assistants_next_message_as_chat_gives_it(served: Served, session: Session) -> None:
    expected = text_of(session.chat(TALK, Settings(20, GREEDY)))
    answer = served.chat(messages=TALK, max_tokens=20, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == expected
    again = served.chat(messages=TALK, max_completion_tokens=20, temperature=0)
    assert again.choices == answer.choices


def test_a_stream_opens_with_the_role_and_ends_with_a_reason(served: Served, session: Session) -> None:
    expected = [text_of(session.chat(TALK, Settings(20, Sampling(temperature=0.8), seed=seed))) for seed in (11, 12)]
    texts, reasons = ["", ""], {}
    chunks = list(served.chat(messages=TALK, max_tokens=20, temperature=0.8, seed=11, n=2, stream=True))
    assert [choice.delta.role for chunk in chunks[:2] for choice in chunk.choices] == ["assistant"] * 2
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            assert choice.index not in reasons
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == expected
    assert set(reasons) == {0, 1}


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(served: Served, session: Session, stream: bool) -> None:
    prompt, _ = session.tokenizer.encode_chat(TALK, add_generation_prompt=True)
    decoder = session.decoder(1, 128)
    decoder.add(prompt, Settings(7, logprobs=3), session.tokenizer.stop_ids)
    steps = [step for step in decoder.run() if step.token is not None]
    asked = {"messages": TALK, "max_tokens": 7, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    if stream:
        chunks = served.chat(**asked, stream=True)
        found = [item for chunk in chunks if (own := chunk.choices[0].logprobs) for item in own.content or []]
    else:
        own = served.chat(**asked).choices[0].logprobs
        assert own is not None
        found = own.content or []
    assert [item.logprob for item in found] == pytest.approx([step.logprob for step in steps], abs=1e-5)
    for item, step in zip(found, steps, strict=True):
        assert len(item.top_logprobs) == 3
        assert [best.logprob for best in item.top_logprobs] == pytest.approx(
            [logprob for _, logprob in step.alternatives], abs=1e-5
        )
        assert item.bytes is None or bytes(item.bytes).decode() == item.token


def test_stop_strings_and_the_end_of_the_context(served: Served, session: Session) -> None:
    whole = text_of(session.chat(TALK, Settings(128, Sampling(temperature=1.2), seed=3)))
    stop = whole[5:8]
    asked = {"messages": TALK, "temperature": 1.2, "seed": 3}
    choice = served.chat(**asked, stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert served.chat(**asked).choices[0].message.content == whole


def test_content_in_parts_and_a_developer_are_the_same_conversation(served: Served) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *TALK[1:],
    ]
    asked = {"max_tokens": 12, "temperature": 0}
    expected = served.chat(**asked, messages=TALK)
    assert served.chat(**asked, messages=parts).choices == expected.choices
    assert expected.usage is not None


def test_an_answer_can_be_sent_back_as_it_came(served: Served) -> None:
    asked = {"max_tokens": 5, "temperature": 0}
    answer = served.chat(**asked, messages=TALK).choices[0].message
    again = [*TALK, answer, {"role": "user", "content": "go on"}]
    assert served.chat(**asked, messages=again).choices[0].message.role == "assistant"
    with_calls = [
        TALK[1],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert served.chat(**asked, messages=with_calls).choices[0].finish_reason


def test_without_a_chat_template_chat_is_refused_and_completion_is_not(serve: Serve, session: Session) -> None:
    config = {key: value for key, value in session.tokenizer._config.items() if key != "chat_template"}
    plain = Session(session.checkpoint, session.model, Tokenizer(session.tokenizer._backend, config))
    served = serve(plain)
    answer = served.post("chat/completions", messages=TALK)
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]
    assert served.post("completions", prompt="x", max_tokens=2).status_code == 200
    assert served.http.get("/v1/models").json()["data"][0]["chat"] == "no"
