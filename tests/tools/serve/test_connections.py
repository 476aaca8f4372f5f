"""Connections that say nothing, or too little, and more of them than there may be."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.processes import ENVIRONMENT
from tests.tools.serve.conftest import Serve, connect, head

ONCE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET /health HTTP/1.1\r\nHo",
        ONCE + b"GET /hea",
        head(1000).replace(b"localhost", b"evil.example") + b"x",  # refused before its body, of which there is more
    ],
    ids=["nothing", "half a request", "a request and a half", "a body after its answer"],
)
def test_a_connection_whose_request_does_not_come_is_closed(serve: Serve, said: bytes) -> None:
    """Also when bytes go on coming, one by one, which keeps uvicorn's own clock from running out."""
    served = serve(head_seconds=0.3, hosts=("localhost", "127.0.0.1"))
    with connect(served.url) as slow:
        slow.settimeout(0.05)
        slow.sendall(said)
        closed = False

        def ended() -> bool:
            nonlocal closed
            with contextlib.suppress(TimeoutError):
                try:
                    if said:
                        slow.sendall(b"x")
                    closed = slow.recv(1 << 16) == b""
                except ConnectionError:
                    closed = True
            return closed

        served.wait(ended)
    assert served.http.get("/health").status_code == 200


def test_an_answer_that_takes_longer_than_headers_may_is_not_cut(serve: Serve) -> None:
    served = serve(head_seconds=0.05)
    body = {"prompt": "x", "max_tokens": 120, "n": 16, "logit_bias": {str(token): -100 for token in range(8)}}
    assert served.post("completions", **body).json()["usage"]["completion_tokens"] == 16 * 120


def limited(limits: str, *command: object) -> subprocess.Popen[str]:
    """Runs Python with ulimit's settings."""
    return subprocess.Popen(
        ["bash", "-c", f'{limits}; exec "$@"', "bash", sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRONMENT,
    )


def test_idle_connections_without_a_key_leave_room_for_others(served_run: Path) -> None:
    """More than the process may have files: the oldest that ask for nothing make room."""
    options = ["--host", "0.0.0.0", "--port", 0, "--api-key", "k", "--device", "cpu"]
    process = limited("ulimit -n 150", "-m", "moe_lm", "serve", served_run, *options)
    assert process.stderr is not None
    with contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        url = process.stderr.readline().removeprefix("serving on ").split(";")[0].replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=30) as client:
            for _ in range(160):
                stack.enter_context(connect(url))
            for _ in range(3):
                assert client.get("/health", headers={"Connection": "close"}).status_code == 200
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        process.terminate()
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one() -> None:
    program = "from moe_lm.common.process import open_files; print(open_files())"
    out, err = limited("ulimit -Sn 100; ulimit -Hn 300", "-c", program).communicate(timeout=60)
    assert err == ""
    assert 280 < int(out) < 300
