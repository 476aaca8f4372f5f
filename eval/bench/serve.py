"""Load on `moe-lm serve`: many clients at once on the loopback, beside the same requests one at a time.

    python eval/bench/serve.py RUN [--clients 100] [--output eval/results/serve.json]

RUN is a quickstart's `pretrain`. The server is a process of its own with its default options; the clients stream, in
one other process on the same cores. A request is lost when it does not end with [DONE] and a finish reason.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch

PROMPTS = ("import os\n", "def read_file(path):\n", "class Stack:\n", "# The module", "Return the")
MAX_TOKENS = 64
ALONE, ROUNDS = 20, 3  # requests one at a time, and rounds of all clients at once


@dataclass(frozen=True)
class Request:
    """How one went; seconds from when it was sent."""

    complete: bool
    tokens: int
    first: float
    last: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with server(arguments.run) as url:
        result = asyncio.run(measure(url, arguments.clients))
    result = {
        "date": f"{datetime.date.today()}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores for server and clients, load {load:.1f} before",
        "torch": torch.__version__,
        "max_tokens": MAX_TOKENS,
        **result,
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@contextmanager
def server(run: Path) -> Iterator[str]:
    """The address of a server that is ready; it must end well."""
    command = [sys.executable, "-m", "moe_lm", "serve", str(run), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("serving on "))
    try:
        yield line.removeprefix("serving on ").split(";")[0]
    finally:
        process.terminate()
        _, err = process.communicate()
        if process.returncode or err:
            print(f"the server ended with {process.returncode}: {err}", file=sys.stderr)


async def measure(url: str, clients: int) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await ask(client, 0)
        started = time.perf_counter()
        alone = [await ask(client, number) for number in range(ALONE)]
        alone_seconds = time.perf_counter() - started
        together, together_seconds = list[Request](), 0.0
        for _ in range(ROUNDS):
            started = time.perf_counter()
            together += await asyncio.gather(*(ask(client, number) for number in range(clients)))
            together_seconds += time.perf_counter() - started
    return {
        "one_at_a_time": summary(alone, alone_seconds),
        f"{clients}_at_once": summary(together, together_seconds) | {"rounds": ROUNDS},
    }


async def ask(client: httpx.AsyncClient, number: int) -> Request:
    body = {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "max_tokens": MAX_TOKENS,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started, first, tokens, finished, done = time.perf_counter(), 0.0, 0, False, False
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if not line:
                    continue
                first = first or time.perf_counter() - started
                data = line.removeprefix("data: ")
                done = data == "[DONE]"
                if not done:
                    chunk = json.loads(data)
                    tokens = chunk["usage"]["completion_tokens"] if chunk.get("usage") else tokens
                    finished |= any(choice["finish_reason"] for choice in chunk.get("choices", ()))
    except httpx.HTTPError as error:
        print(f"lost: {error!r}", file=sys.stderr)
    return Request(done and finished, tokens, first, time.perf_counter() - started)


def summary(requests: Sequence[Request], seconds: float) -> dict[str, Any]:
    complete = [request for request in requests if request.complete]
    return {
        "requests": len(requests),
        "lost": len(requests) - len(complete),
        "tokens_per_second": round(sum(request.tokens for request in complete) / seconds, 1),
        "seconds_to_first_token": percentiles([request.first for request in complete]),
        "seconds_to_the_end": percentiles([request.last for request in complete]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    places = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": round(statistics.median(values), 3), "p95": round(places[-1], 3)}


if __name__ == "__main__":
    main()
