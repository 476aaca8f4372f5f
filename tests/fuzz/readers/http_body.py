"""The bodies of requests to `moe-lm serve`, answered by a small model: 200 and a text, or 4xx and a sentence."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx

from moe_lm.generate.session import Session
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.serve.app import build_app
from moe_lm.tools.serve.limits import Limits
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.scheduler import Scheduler
from tests.fuzz.frame import Read, Reader
from tests.fuzz.mutations import mutate_json
from tests.tiny import tiny_model, write_run

ROOT = Path(__file__).parents[3]
BODIES = (
    {"prompt": "import os", "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": ["a", "b"], "seed": 1},
    {"prompt": [[5, 6], [7]], "logprobs": 2, "stream": True, "stream_options": {"include_usage": True}},
    {"prompt": ["a", "b"], "echo": True, "logit_bias": {"42": -100}, "top_k": 3, "min_p": 0.1, "routing": True},
    {"messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 2, "logprobs": True, "top_logprobs": 1},
    {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "be brief"}]},
            {"role": "user", "content": "é"},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, {"y": null}]}'}}
            ]},
            {"role": "tool", "content": "3", "name": "f", "tool_call_id": "1"},
        ],
        "stream": True, "user": "someone", "max_tokens": 2,
    },
)  # fmt: skip


class RefusedError(Exception):
    """The sentence of a 4xx answer."""


def prepare(folder: Path) -> Read:
    tokenizer = Tokenizer.load(ROOT / "tokenizer" / "tiny")
    session = Session.load(
        write_run(folder / "run", tiny_model(vocab_size=1100, max_position_embeddings=128), tokenizer), device="cpu"
    )
    metrics, loop = Metrics(), asyncio.new_event_loop()
    scheduler = Scheduler(session, 4, 128, 64, metrics)
    scheduler.start(loop)
    app = build_app(session, scheduler, Limits(max_body=1 << 20, timeout=60, max_tokens=8), metrics, "tiny")
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")

    async def post(data: bytes) -> httpx.Response:
        path = "chat/completions" if b'"messages"' in data else "completions"
        return await client.post(f"/v1/{path}", content=data, headers={"Content-Type": "application/json"})

    def read(data: bytes) -> None:
        answer = loop.run_until_complete(post(data))
        if 400 <= answer.status_code < 500:
            raise RefusedError(answer.json()["error"]["message"])
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        assert 'data: {"error"' not in answer.text, answer.text

    return read


def seeds() -> list[bytes]:
    return [json.dumps(body).encode() for body in BODIES]


READER = Reader("http-body", prepare, seeds, mutate_json, refusals=(RefusedError,), inputs_in_ci=40)
