"""A server on a port of its own, around a small model of random weights."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from moe_lm.generate.session import Session
from moe_lm.tokenizer.tokenizer import Tokenizer
from moe_lm.tools.serve.app import build_app
from moe_lm.tools.serve.connections import HEAD_SECONDS, server_config
from moe_lm.tools.serve.limits import Limits
from moe_lm.tools.serve.metrics import Metrics
from moe_lm.tools.serve.scheduler import Scheduler
from moe_lm.tools.serve.server import listen
from tests.tiny import tiny_model, write_run

CONTEXT = 128
MODEL = "tiny"


@pytest.fixture(scope="session")
def served_run(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    model = tiny_model(
        vocab_size=1100,  # more than the tokenizer has
        max_position_embeddings=CONTEXT,
        n_routed_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    return write_run(tmp_path_factory.mktemp("serve") / "run", model, tiny_tokenizer)


@pytest.fixture(scope="session")
def session(served_run: Path) -> Session:
    return Session.load(served_run, device="cpu")


@dataclass
class Served:
    """A running server, its parts, and clients that ask it."""

    url: str
    scheduler: Scheduler
    app: FastAPI
    http: httpx.Client
    openai: openai.OpenAI

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(f"/v1/{path}", json=body)

    def complete(self, **body: Any) -> Any:
        """The answer to OpenAI's client, or the chunks of a stream."""
        return self.openai.completions.create(model=MODEL, **body)

    def chat(self, **body: Any) -> Any:
        return self.openai.chat.completions.create(model=MODEL, **body)

    def metric(self, name: str) -> float:
        """A figure of /metrics; `name` may have labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until something has happened, which it must within a minute."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)


Serve = Callable[..., Served]


@pytest.fixture(scope="module")
def serve(session: Session) -> Iterator[Serve]:
    """Starts servers; `limits` by keyword."""
    ends: list[Callable[[], None]] = []

    def start(
        own: Session | None = None,
        slots: int = 4,
        max_queue: int = 256,
        context: int = CONTEXT,
        head_seconds: float = HEAD_SECONDS,
        **limits: Any,
    ) -> Served:
        one, metrics = own or session, Metrics()
        scheduler = Scheduler(one, slots, context, max_queue, metrics)
        app = build_app(one, scheduler, Limits(**{"max_body": 1 << 16, "timeout": 60.0} | limits), metrics, MODEL)
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(server_config(app, scheduler.most, 5, head_seconds))

        async def main() -> None:
            scheduler.start(asyncio.get_running_loop())
            await server.serve(sockets=[listener])
            scheduler.close()

        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=asyncio.run, args=[main()])
        thread.start()
        key = limits.get("api_key") or "none"
        headers = {"Authorization": f"Bearer {key}"}
        http = httpx.Client(base_url=url, headers=headers, timeout=60)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60)

        def end() -> None:
            http.close()
            client.close()
            server.should_exit = True
            thread.join()

        ends.append(end)
        return Served(url, scheduler, app, http, client)

    yield start
    for end in reversed(ends):
        end()


@pytest.fixture(scope="module")
def served(serve: Serve) -> Served:
    return serve()


def head(length: int) -> bytes:
    """The headers of a request for a completion whose body has this many bytes."""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)
