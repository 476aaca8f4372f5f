"""Every refusal has OpenAI's shape and says what to do; nothing that changes an answer is passed over."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import httpx
import openai
import pytest

from moe_lm.generate.session import Session
from moe_lm.tools.serve import endpoints
from tests.tools.serve.conftest import CONTEXT, MODEL, Serve, Served, connect, head

CHAT = [{"role": "user", "content": "a"}]


def send(served: Served, path: str, body: Any) -> httpx.Response:
    """Post a body that is called JSON, whatever it is."""
    return served.http.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})


def check(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("n", "2"), ("n", 1.5), ("n", True), ("max_tokens", 0), ("max_tokens", -1),
        ("temperature", -0.1), ("temperature", "hot"), ("top_p", 1.1), ("top_k", 0), ("min_p", 2), ("seed", 1 << 70),
        ("seed", "x"), ("repetition_penalty", 0), ("presence_penalty", "x"), ("stop", ["a"] * 5), ("stop", ""),
        ("stop", [1]), ("stop", {"a": 1}), ("logit_bias", {"x": 1}), ("logit_bias", {"5": "x"}),
        ("logit_bias", {"5": 10**400}), ("logit_bias", {"-1": 1}), ("logit_bias", {"1024": 1}),
        ("logit_bias", {str(token): 0 for token in range(2000)}), ("logit_bias", [1]), ("stream", "yes"),
        ("logprobs", 21), ("logprobs", -1), ("prompt", None), ("prompt", 5), ("prompt", []), ("prompt", [[]]),
        ("prompt", ["a", 1]), ("prompt", [[1, "a"]]), ("prompt", [5, -1]), ("prompt", [5, 1 << 70]),
        ("prompt", [1024]), ("prompt", "\ud800"), ("prompt", {"a": 1}), ("echo", 1), ("best_of", 3),
        ("suffix", "end"), ("tools", [{}]), ("response_format", {"type": "json_schema"}), ("temprature", 1),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_or_unknown_is_named(served: Served, field: str, value: Any) -> None:
    body = json.dumps({"prompt": "x", "max_tokens": 2} | {field: value})
    error = check(send(served, "completions", body), 400)
    assert str(error["param"]).split(".")[0] == field
    assert field in error["message"] or field == "prompt"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"), ({"messages": None}, "messages"), ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "messages.0.mood"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, None),
        ({"top_logprobs": 2}, ""), ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, ""), ({"stream_options": {"include_usage": True}}, ""),
        ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning_effort"), ({"prompt": "x"}, "prompt"),
    ],
)  # fmt: skip
def test_chat_refuses_by_name(served: Served, change: dict[str, Any], param: str | None) -> None:
    body = json.dumps({"messages": CHAT, "max_tokens": 2} | change)
    error = check(send(served, "chat/completions", body), 400)
    assert param is None or (error["param"] or "") == param


def test_harmless_fields_and_null_are_as_if_they_were_not_there(served: Served) -> None:
    plain = served.post("chat/completions", messages=CHAT, max_tokens=8, temperature=0).json()
    more = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "response_format": None}
    more |= {"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "stop": None, "seed": None}
    more |= {"response_format": {"type": "text"}, "model": MODEL}
    assert (
        served.post("chat/completions", messages=CHAT, max_tokens=8, temperature=0, **more).json()["choices"]
        == plain["choices"]
    )


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b'{"prompt": ', b"\xff\xfe{}", b"[]", b'"text"', b"null", b"5",
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}",
    ],
    ids=lambda body: str(body[:24]),
)  # fmt: skip
def test_a_malformed_body_is_refused(served: Served, body: bytes) -> None:
    for path in ("completions", "chat/completions"):
        check(send(served, path, body), 400)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
        (b'{"prompt": ' + b"[" * 20000 + b"]" * 20000 + b"}", "are nested too deep"),
        (b'{"prompt": ' + b"[" * 101 + b"]" * 101 + b"}", "more than 100 deep"),
        (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "send a smaller one"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_what_a_parser_of_json_cannot_take_is_said(served: Served, body: bytes, said: str) -> None:
    error = check(send(served, "completions", body), 400)
    assert said in error["message"]


@pytest.mark.parametrize(
    "arguments", ['{"a":' + "[" * 200000, '{"a":' + "[" * 101 + "]" * 101 + "}"], ids=["endless", "valid"]
)
def test_arguments_that_lie_too_deep_are_refused_by_name(serve: Serve, arguments: str) -> None:
    served = serve(max_body=1 << 20)
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    error = check(served.post("chat/completions", messages=[*CHAT, call, *CHAT], max_tokens=2), 400)
    assert error["param"] == "messages.1.tool_calls.0.function.arguments"
    assert "more than 100 deep" in error["message"]


def test_arguments_as_deep_as_they_may_be_are_read(served: Served) -> None:
    arguments = '{"a":' + "[" * 100 + "]" * 100 + "}"
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    answer = served.post("chat/completions", messages=[*CHAT, call, *CHAT], max_tokens=2)
    assert "deep" not in answer.text


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_that_does_not_call_itself_json_is_refused(served: Served, content_type: str | None) -> None:
    """A web page may send these to any server without asking it first."""
    headers = {"Content-Type": content_type} if content_type else {}
    answer = served.http.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert "Content-Type" in check(answer, 400)["message"]


def test_paths_methods_and_models_that_are_not_there(served: Served) -> None:
    assert "/v1/models" in check(served.http.get("/v1/nothing"), 404)["message"]
    check(served.http.get("/docs"), 404)
    check(served.http.get("/openapi.json"), 404)
    wrong = served.http.get("/v1/completions")
    assert "POST" in check(wrong, 405)["message"]
    assert wrong.headers["allow"] == "POST"
    check(served.http.delete("/v1/models"), 405)
    for error in (
        check(served.post("completions", prompt="x", model="gpt-4"), 404),
        check(served.http.get("/v1/models/gpt-4"), 404),
    ):
        assert error["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        served.openai.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])


def test_models_health_and_headers(served: Served) -> None:
    [model] = served.openai.models.list().data
    assert model.id == MODEL
    assert served.openai.models.retrieve(MODEL) == model
    described = model.model_dump()
    assert (described["moe_layers"], described["experts"], described["experts_per_token"]) == (2, 4, 2)
    assert described["layers"] == [1, 2]  # counted from 0
    assert described["shown"].startswith(f"{described['id']} · 0.")
    assert described["max_model_len"] == CONTEXT
    answer = served.http.get("/health")
    assert answer.json() == {"status": "ok"}
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "access-control-allow-origin" not in answer.headers


def test_a_prompt_longer_than_the_context(served: Served) -> None:
    for stream in (False, True):
        error = check(served.post("completions", prompt=[5] * (CONTEXT + 1), stream=stream), 400)
        assert error["code"] == "context_length_exceeded"
        assert f"{CONTEXT + 1} tokens, more than the context's {CONTEXT}" in error["message"]
    error = check(served.post("chat/completions", messages=[{"role": "user", "content": "import os " * 80}]), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    with pytest.raises(openai.BadRequestError):
        served.openai.completions.create(model=MODEL, prompt="import os " * 80)
    assert served.post("completions", prompt=[5] * CONTEXT, max_tokens=1).status_code == 200


@pytest.mark.parametrize("ids", [[5, -1], [5, 1 << 70], [1024]])
def test_ids_that_are_no_tokens_are_not_echoed(served: Served, ids: list[int]) -> None:
    assert check(served.post("completions", prompt=ids, echo=True), 400)["param"] == "prompt"


def test_limits_of_length(serve: Serve) -> None:
    served = serve(max_tokens=5, context=20, max_body=300)
    assert "at most 5" in check(served.post("completions", prompt="x", max_tokens=6), 400)["message"]
    check(served.post("chat/completions", messages=CHAT, max_completion_tokens=6), 400)
    assert served.post("completions", prompt="x").json()["usage"]["completion_tokens"] <= 5
    answer = served.post("chat/completions", messages=CHAT, temperature=0)
    assert answer.json()["usage"]["completion_tokens"] <= 5
    check(served.post("completions", prompt=[5] * 21), 400)
    assert check(served.post("completions", prompt="x" * 300), 413)["code"] == "body_too_large"


def test_a_conversation_of_very_many_messages_is_refused(served: Served) -> None:
    talk = [{"role": role, "content": "hello"} for _ in range(500) for role in ("user", "assistant")]
    error = check(served.post("chat/completions", messages=talk), 400)
    assert error["code"] == "context_length_exceeded"


def test_more_texts_than_there_is_room_for_are_refused_before_they_are_read(served: Served) -> None:
    error = check(served.post("completions", prompt=["x"] * 10000, n=100), 400)
    assert error["code"] == "too_many_texts"


def test_an_answer_with_more_log_probabilities_than_can_be_built_is_refused(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "MOST_VALUES", 2 * 10 * 21)
    fits: dict[str, Any] = {"prompt": "x", "n": 2, "max_tokens": 10, "logprobs": 20, "routing": False}
    assert served.post("completions", **fits).status_code == 200
    for more in ({"n": 3}, {"max_tokens": 11}, {"routing": True}):
        error = check(served.post("completions", **fits | more), 400)
        assert error["code"] == "answer_too_large"
        assert f"more than {2 * 10 * 21}; ask for fewer" in error["message"]
    assert served.post("completions", **fits | {"n": 3, "stream": True}).status_code == 200
    assert served.post("completions", **fits | {"n": 3, "logprobs": None}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_built_beside_the_event_loop_and_names_are_kept(
    serve: Serve, session: Session, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """Every name is read once, in no thread that others wait for."""
    served = serve()
    read: list[tuple[int, int]] = []
    decode = session.tokenizer.decode

    def spy(ids: Sequence[int], skip_special: bool = True) -> str:
        if not skip_special:
            read.append((ids[0], threading.get_ident()))
        return decode(ids, skip_special)

    monkeypatch.setattr(session.tokenizer, "decode", spy)
    loop: Future[int] = Future()
    served.scheduler._loop.call_soon_threadsafe(lambda: loop.set_result(threading.get_ident()))
    for _ in range(2):
        body = {"prompt": "x", "max_tokens": 20, "n": 3, "logprobs": 5, "seed": 1, "stream": stream}
        assert served.post("completions", **body).status_code == 200
    tokens = [token for token, _ in read]
    assert len(tokens) > 20
    assert len(set(tokens)) == len(tokens)
    assert loop.result(60) not in {thread for _, thread in read}


def test_a_body_that_is_longer_than_it_says_or_says_nothing(serve: Serve) -> None:
    """In chunks there is no Content-Length to go by."""
    served = serve(max_body=300)

    def parts() -> Any:
        for _ in range(10):
            yield b" " * 100

    check(send(served, "completions", parts()), 413)


def test_a_body_that_does_not_come_is_not_waited_for(serve: Serve) -> None:
    served = serve(timeout=0.2, max_body=300)
    for length, status in ((9, b"408"), (301, b"413")):  # one that would be too long is refused by its length alone
        with connect(served.url) as slow:
            slow.sendall(head(length))
            assert slow.recv(4096).startswith(b"HTTP/1.1 " + status)


def test_the_key(serve: Serve) -> None:
    served = serve(api_key="secret")
    assert served.openai.completions.create(model=MODEL, prompt="x", max_tokens=2).choices
    with httpx.Client(base_url=served.url) as stranger:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                answer = stranger.get(path, headers=headers)
                assert check(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
            check(stranger.post("/v1/completions", json={"prompt": "x"}, headers=headers), 401)
        assert stranger.get("/health").status_code == 200
        assert stranger.get("/").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_page_that_rebinds_its_name_is_not_answered(serve: Serve) -> None:
    served = serve(hosts=("localhost", "127.0.0.1", "[::1]"))
    for name in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST"):
        assert served.http.get("/health", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "localhost.evil.example"):
        check(served.http.get("/health", headers={"Host": name}), 421)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_ended(serve: Serve, stream: bool) -> None:
    served = serve(timeout=0.3)
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 120, "n": 128, "temperature": 0, "stream": stream}
    body["logit_bias"] = {"0": -100, "1": -100, "2": -100}
    answer = served.post("completions", **body)
    if answer.status_code == 200:  # it began in time
        last = [line for line in answer.text.split("\n") if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert "[DONE]" not in answer.text
        with pytest.raises(openai.APIError):
            list(served.openai.completions.create(model=MODEL, **body))
    else:
        error = check(answer, 504)
    assert error["code"] == "timeout"
    served.wait(lambda: served.scheduler.running == served.scheduler.queued == 0)
