"""The verb: a real process on a real port, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from moe_lm.generate.decode import Settings
from moe_lm.generate.session import Session
from moe_lm.generate.strategies import Sampling
from tests.conftest import Done
from tests.generate.test_cached import needs_compiler
from tests.processes import ENVIRONMENT, free_port
from tests.texts import text_of
from tests.tools.serve.conftest import connect, head

Start = Callable[..., subprocess.Popen[str]]
NEVER_END = {"logit_bias": {str(token): -100 for token in range(8)}}


def start(start_moe_lm: Start, *arguments: object, **environment: object) -> tuple[subprocess.Popen[str], str]:
    """A server that is ready, and its address."""
    process = start_moe_lm("serve", *arguments, "--port", 0, "--device", "cpu", **environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving on "):
            return process, line.removeprefix("serving on ").split(";")[0]
    raise AssertionError(process.communicate())


def wait_until_refused(url: str) -> None:
    """Until the server takes no new connection, which is after it has heard the signal."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < deadline:
            connect(url).close()
            time.sleep(0.01)
        raise AssertionError


def test_sigterm_lets_what_runs_end_and_nothing_new_begin(served_run: Path, start_moe_lm: Start) -> None:
    process, url = start(start_moe_lm, served_run)
    assert httpx.get(f"{url}/health", headers={"Host": "any.example"}).status_code == 421
    body = {"prompt": "x", "max_tokens": 120, "stream": True, "n": 40, **NEVER_END}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        late = connect(url)  # its request has begun, and its body comes after the signal
        late.sendall(head(length=len(b'{"prompt": "x"}')))
        process.send_signal(signal.SIGTERM)
        wait_until_refused(url)
        late.sendall(b'{"prompt": "x"}')
        assert late.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
        late.close()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_server_writes_the_same(served_run: Path, session: Session, start_moe_lm: Start) -> None:
    _, url = start(start_moe_lm, served_run, "--compile", "--max-concurrent", 3)
    body = {"prompt": "import ", "max_tokens": 8, "temperature": 0, "n": 2}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    text = text_of(session.complete("import ", Settings(8)))
    assert [choice["text"] for choice in answer["choices"]] == [text, text]


def test_options_reach_the_server_and_a_second_signal_does_not_wait(served_run: Path, start_moe_lm: Start) -> None:
    limits = ["--max-context", 100, "--max-tokens", 60, "--max-concurrent", 1]
    process, url = start(
        start_moe_lm, served_run, "--host", "0.0.0.0", "--model-name", "mine", *limits, MOE_LM_API_KEY="k"
    )
    url = url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(f"{url}/v1/models").status_code == 401
    assert httpx.get(f"{url}/health", headers={"Host": "any.example"}).status_code == 200
    with httpx.Client(base_url=url, headers={"Authorization": "Bearer k"}, timeout=60) as client:
        [model] = client.get("/v1/models").json()["data"]
        assert (model["id"], model["max_model_len"]) == ("mine", 100)
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 61}).status_code == 400
        assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}).status_code == 200
        body = {"prompt": "x", "max_tokens": 60, "stream": True, "n": 128, **NEVER_END}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert (*process.communicate(timeout=60), process.returncode) == ("", "", 0)


def test_beyond_the_loopback_without_a_key_is_warned_of(
    served_run: Path, session: Session, start_moe_lm: Start, tmp_path: Path
) -> None:
    """At once; who comes while the model loads is answered when it is there. This one lies on the disk."""
    on_disk = ["--device-map", "auto", "--max-memory", "cpu=0MiB", "--offload-folder", tmp_path / "offload"]
    process = start_moe_lm("serve", served_run, "--host", "0.0.0.0", "--port", 0, *on_disk)
    assert process.stderr is not None
    warning = process.stderr.readline()
    assert warning.startswith("warning: 0.0.0.0:")
    assert "can be reached by others, and there is no --api-key" in warning
    port = warning.split(" ")[1].rpartition(":")[2]
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "ok"}
    assert list((tmp_path / "offload").glob("*/*.dat"))
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 5, "seed": 1}, timeout=60)
    expected = text_of(session.complete("x", Settings(5, Sampling(temperature=1.0), seed=1)))
    assert answer.json()["choices"][0]["text"] == expected
    process.terminate()
    assert process.wait(timeout=60) == 0


def test_a_port_in_use_is_one_sentence(served_run: Path, moe_lm: Callable[..., Done]) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        done = moe_lm("serve", served_run, "--port", port)
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith(f"error: cannot listen on 127.0.0.1:{port} (")
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "no.such.host.invalid"], 1, "is not an address of this machine"),
        (["--host", "192.0.2.1"], 1, "cannot listen on 192.0.2.1:0"),
        (["--api-key", ""], 2, "--api-key is empty"),
        (["--api-key", "schlüssel"], 2, "--api-key is empty or has a character"),
        (["--max-concurrent", "0"], 2, "max-concurrent"),
        (["--max-concurrent", 1 << 40, "--device", "cpu"], 1, "give a smaller --max-concurrent"),
        (["--max-memory", "cpu=1GiB"], 2, "--max-memory belongs to a model on several devices"),
        (["--device-map", "auto", "--device", "cpu"], 2, "--device cpu names one device"),
    ],
)
def test_what_cannot_be_served(
    served_run: Path, moe_lm: Callable[..., Done], arguments: list[Any], code: int, said: str
) -> None:
    done = moe_lm("serve", served_run, "--port", 0, *arguments)
    assert (done.code, done.out) == (code, "")
    assert said in done.err


def test_a_run_that_is_not_there(tmp_path: Path, moe_lm: Callable[..., Done]) -> None:
    done = moe_lm("serve", tmp_path / "none", "--port", 0)
    assert done.code == 2
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_how_to_get_it(
    served_run: Path, moe_lm: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    done = moe_lm("serve", served_run)
    assert done.code == 1
    assert f"serve needs {package}" in done.err
    assert "[serve]" in done.err


def test_help_imports_neither_torch_nor_the_extra() -> None:
    program = (
        "import sys; sys.argv = ['moe-lm', 'serve', '--help']\n"
        "from moe_lm.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: print([name for name in ('torch', 'fastapi', 'uvicorn') if name in sys.modules])"
    )
    command, environment = [sys.executable, "-c", program], os.environ | ENVIRONMENT
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--max-concurrent" in done.stdout
